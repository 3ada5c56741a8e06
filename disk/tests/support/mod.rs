//! What the tests of disks share: a base whose fetches can be held, failed and counted, and files that lose what was not
//! synced.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test may")]

pub(crate) mod crash;
pub(crate) mod source;

use std::{sync::Arc, time::Duration};

use dormouse_disk::{
    Disk, DiskOptions, Identity, Policy, Result, budget::Budget, fetch::Fetchers, file::Directory,
    source::PageSource,
};

pub(crate) const PAGE: usize = 4096;

pub(crate) fn identity(size_bytes: u64) -> Identity {
    Identity { snapshot: [9; 32], image: "root".into(), size_bytes, owner_token: 1 }
}

pub(crate) fn options(
    source: Arc<dyn PageSource>,
    size_bytes: u64,
    overlay: Option<Arc<dyn Directory>>,
) -> DiskOptions {
    DiskOptions {
        source,
        identity: identity(size_bytes),
        overlay,
        fetchers: Arc::new(Fetchers::start(4).unwrap()),
        budget: Arc::new(Budget::unlimited()),
        policy: Policy { base_wait_max: Duration::from_secs(60), ..Policy::default() },
    }
}

pub(crate) fn open(
    source: &Arc<source::TestSource>,
    size_bytes: u64,
    overlay: &Arc<crash::Files>,
) -> Result<Disk> {
    Disk::open(options(source.clone(), size_bytes, Some(overlay.clone())))
}

pub(crate) fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}
