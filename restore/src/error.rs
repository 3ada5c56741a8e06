//! Why a restore could not be started or go on.

use dormouse_core::page::PageIndex;

use crate::source::SourceError;
use crate::sys::uffd::UffdError;

/// Why a restore could not be started or go on.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The memory handed over has other regions than the plan.
    #[error("the plan has {planned} regions and the memory {given}: pass the regions the plan was made from")]
    RegionCount {
        /// Regions in the plan.
        planned: usize,
        /// Regions in the memory.
        given: usize,
    },
    /// A region's size or page size is not the plan's.
    #[error(
        "region {region} of the memory has {given_bytes} bytes in pages of {given_page_bytes}, the plan says {planned_bytes} in pages of {planned_page_bytes}"
    )]
    RegionShape {
        /// Which region, from zero.
        region: usize,
        /// Its bytes.
        given_bytes: u64,
        /// Its page size.
        given_page_bytes: u64,
        /// The plan's bytes.
        planned_bytes: u64,
        /// The plan's page size.
        planned_page_bytes: u64,
    },
    /// A setting makes no sense.
    #[error("policy: {0}")]
    Policy(&'static str),
    /// A userfaultfd call failed.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A thread or eventfd could not be had.
    #[error("cannot start the restore's threads: {0}; raise the process's limits on threads and open files")]
    Start(#[source] std::io::Error),
    /// The VM's address space is gone: its process has ended.
    #[error("the VM is gone: its process has ended")]
    VmGone,
    /// A region was unmapped or unregistered behind the restore's back.
    #[error("region {region} is no longer registered: it was unmapped, or unregistered by someone else")]
    RegionGone {
        /// Which region, from zero.
        region: usize,
    },
    /// The kernel refused to install pages.
    #[error("the kernel refused to install pages from image page {} on: {error}", page.0)]
    Install {
        /// The first page refused.
        page: PageIndex,
        /// The kernel's word.
        error: std::io::Error,
    },
    /// A page could not be had correctly.
    #[error("image page {} cannot be had correctly, so it is withheld: {error}", page.0)]
    Page {
        /// The page.
        page: PageIndex,
        /// Why.
        error: SourceError,
    },
    /// The page could not be poisoned either; its vCPU waits until the VM is ended.
    #[error(
        "image page {} cannot be poisoned ({error}), so its vCPU waits: end the VM, or give the policy a kill function; poisoning needs Linux 6.6",
        page.0
    )]
    CannotPoison {
        /// The page.
        page: PageIndex,
        /// The kernel's word.
        error: std::io::Error,
    },
    /// A fault outside all regions.
    #[error(
        "fault at {address:#x}, outside all regions of the plan: the VMM registered memory it did not announce"
    )]
    StrayFault {
        /// Where.
        address: u64,
    },
    /// Bytes for pages no region shows.
    #[error("no region shows image page {}: install only pages of the plan", page.0)]
    NotShown {
        /// The page.
        page: PageIndex,
    },
    /// Not whole pages.
    #[error("{bytes} bytes are not whole pages of 4096 bytes")]
    NotPages {
        /// Bytes given.
        bytes: usize,
    },
    /// The restore was stopped.
    #[error("the restore was stopped")]
    Stopped,
}
