//! What a range holds, without reading it.

use dormouse_core::PAGE_BYTES;

use super::{Disk, Holder};
use crate::{error::Result, source::Content};

const PAGE: u64 = PAGE_BYTES as u64;

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorKind {
    /// Something, zeros perhaps.
    Data,
    /// Zeros that take no space.
    Hole,
}

impl Disk {
    /// The runs from `offset` on, up to `length` bytes and `runs_max` runs, of which there is at least one.
    pub fn status(&self, offset: u64, length: u64, runs_max: usize) -> Result<Vec<(u64, SectorKind)>> {
        self.check_range(offset, length)?;
        let (end, deadline) = (offset + length, self.base.deadline());
        let mut runs: Vec<(u64, SectorKind)> = Vec::new();
        let mut at = offset;
        while at < end {
            let (until, kind) = self.kind_at(at, end, deadline)?;
            let full = runs.len() == runs_max.max(1);
            match runs.last_mut() {
                Some((bytes, last)) if *last == kind => *bytes += until - at,
                _ if full => break,
                _ => runs.push((until - at, kind)),
            }
            at = until;
        }
        Ok(runs)
    }

    /// What the byte at `at` is, and up to where that is sure.
    fn kind_at(&self, at: u64, end: u64, deadline: std::time::Instant) -> Result<(u64, SectorKind)> {
        let page = at / PAGE;
        let to = |pages: u64| page.saturating_add(pages).saturating_mul(PAGE).min(end);
        if let Some(overlay) = &self.overlay {
            let stack = overlay.read();
            match stack.holder(page) {
                Holder::Layer(_) => return Ok((to(1), SectorKind::Data)),
                Holder::Zeros => return Ok((to(1), SectorKind::Hole)),
                Holder::Base => {}
            }
        }
        let place = self.base.place(page, deadline)?;
        let kind = if place.content == Content::Zero { SectorKind::Hole } else { SectorKind::Data };
        let Some(overlay) = &self.overlay else { return Ok((to(place.pages), kind)) };
        // As far as no layer lies over the run.
        let stack = overlay.read();
        let pages = place.pages.min(end.div_ceil(PAGE) - page);
        let mut free = 1;
        while free < pages && matches!(stack.holder(page + free), Holder::Base) {
            free += 1;
        }
        Ok((to(free), kind))
    }
}
