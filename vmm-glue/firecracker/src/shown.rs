//! A VM's memory regions against the snapshot's image.

use std::sync::Arc;

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::{PageSize, PageSource, Plan, RegionSpec};

use super::regions::{self, Region};
use super::session::SessionError;
use dormouse_vmm_common::patient::Patient;

pub(super) fn check_size(source: &dyn PageSource, regions: &[Region]) -> Result<(), SessionError> {
    let image_bytes = source.page_count().0 * PAGE_BYTES as u64;
    let given_bytes = regions.iter().map(|r| r.bytes).fold(0, u64::saturating_add);
    if given_bytes == image_bytes {
        Ok(())
    } else {
        Err(SessionError::WrongSize { given_bytes, image_bytes })
    }
}

/// The plan for `regions`, which must show the whole image.
pub(super) fn plan(source: Arc<dyn PageSource>, regions: &[Region]) -> Result<Plan, SessionError> {
    check_size(&*source, regions)?;
    let spec = |r: &Region| RegionSpec {
        image_first: PageIndex(r.offset / PAGE_BYTES as u64),
        pages: PageCount(r.bytes / PAGE_BYTES as u64),
        page_size: page_size(r.page_size),
    };
    Ok(Plan::new(Arc::new(Patient(source)), &regions.iter().map(spec).collect::<Vec<_>>())?)
}

pub(super) fn announced(regions: &[Region]) -> Vec<AnnouncedRegion> {
    let announce =
        |r: &Region| AnnouncedRegion { address: r.host, bytes: r.bytes, page_size: page_size(r.page_size) };
    regions.iter().map(announce).collect()
}

fn page_size(size: regions::PageSize) -> PageSize {
    match size {
        regions::PageSize::Small => PageSize::Small,
        regions::PageSize::Huge => PageSize::Huge,
    }
}
