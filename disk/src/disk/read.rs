//! Reads.

use dormouse_core::PAGE_BYTES;

use super::{Disk, Holder, PIECE_PAGES, pieces};
use crate::{error::Result, stack::Stack};

const PAGE: u64 = PAGE_BYTES as u64;

impl Disk {
    /// Reads `into.len()` bytes from `offset` on. Every page is as new as the request: a write that was acknowledged before
    /// it is seen, whatever had to be fetched.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let length = into.len() as u64;
        self.check_range(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let end = offset + length;
        if offset.is_multiple_of(PAGE) && end.is_multiple_of(PAGE) {
            return self.read_pages(offset / PAGE, into);
        }
        let first = offset / PAGE;
        let mut whole = vec![0; ((end.div_ceil(PAGE) - first) * PAGE) as usize];
        self.read_pages(first, &mut whole)?;
        let from = (offset - first * PAGE) as usize;
        into.copy_from_slice(&whole[from..from + into.len()]);
        Ok(())
    }

    fn read_pages(&self, first: u64, into: &mut [u8]) -> Result<()> {
        let end = first + (into.len() / PAGE_BYTES) as u64;
        let mut absent = Vec::new();
        match &self.overlay {
            None => absent.extend(first..end),
            Some(overlay) => {
                let stack = overlay.read();
                for pages in pieces(first, end, PIECE_PAGES) {
                    let _kept_still = self.read_lock(pages.start);
                    absent.extend(read_layers(&stack, pages, first, into)?);
                }
            }
        }
        let (Some(lowest), Some(highest)) = (absent.first().copied(), absent.last().copied()) else {
            return Ok(());
        };
        // Nothing is locked from here on: this may take as long as the store does.
        self.base.read(&absent, first, into)?;
        if self.policy.read_ahead_pages_max > 0 {
            self.base.note_read(lowest..highest + 1, self.policy.read_ahead_pages_max);
        }
        let Some(overlay) = &self.overlay else { return Ok(()) };
        // What was written meanwhile is newer than what was fetched.
        let stack = overlay.read();
        for pages in pieces(lowest, highest + 1, PIECE_PAGES) {
            let _kept_still = self.read_lock(pages.start);
            for page in pages.filter(|page| absent.binary_search(page).is_ok()) {
                read_layers(&stack, page..page + 1, first, into)?;
            }
        }
        Ok(())
    }
}

/// Reads those of `pages` that a layer holds, and returns the others.
fn read_layers(stack: &Stack, pages: std::ops::Range<u64>, first: u64, into: &mut [u8]) -> Result<Vec<u64>> {
    let mut absent = Vec::new();
    let mut run: Option<(&crate::layer::Layer, std::ops::Range<u64>)> = None;
    let bytes_of = |pages: &std::ops::Range<u64>| {
        (pages.start - first) as usize * PAGE_BYTES..(pages.end - first) as usize * PAGE_BYTES
    };
    for layer in stack.layers() {
        layer.check_pages(pages.clone())?;
    }
    for page in pages {
        let holder = stack.holder(page);
        if let (Holder::Layer(layer), Some((before, run))) = (&holder, &mut run)
            && std::ptr::eq(*layer, *before)
            && run.end == page
        {
            run.end += 1;
            continue;
        }
        if let Some((layer, pages)) = run.take() {
            layer.read(pages.start, &mut into[bytes_of(&pages)])?;
        }
        match holder {
            Holder::Layer(layer) => run = Some((layer, page..page + 1)),
            Holder::Zeros => into[bytes_of(&(page..page + 1))].fill(0),
            Holder::Base => absent.push(page),
        }
    }
    if let Some((layer, pages)) = run {
        layer.read(pages.start, &mut into[bytes_of(&pages)])?;
    }
    Ok(absent)
}
