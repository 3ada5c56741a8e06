//! What other hosts are told while a standby replaces what its name stands for: that the guest is newer.

use dormouse_chunkstore::{Standing, Store, StoreError};
use dormouse_core::Name;

/// Where Linux keeps what a host calls itself.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// Told before the guest stands still, so that nobody wakes what it is about to replace.
pub(super) fn announce_newer(store: &Store, name: &Name, before: &Standing) -> Result<(), StoreError> {
    if before.snapshot.is_none() {
        return Ok(());
    }
    let host = std::fs::read_to_string(HOST_NAME).unwrap_or_default();
    store.announce_newer(name, before, host.trim())
}

/// Taken back once the guest goes on, or is lost with nothing stored. Where that fails, a wake is refused until the next
/// standby, or needs `--older`: on the safe side.
pub(super) fn withdraw_newer(store: &Store, name: &Name, before: &Standing) {
    if before.snapshot.is_none() {
        return;
    }
    if let Err(why) = store.settle_reference(name, before) {
        tracing::warn!(%name, %why, "other hosts are still told that a newer guest is about to replace it: waking it takes --older");
    }
}
