//! Descriptors that systemd gave this process at its start.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first of them (`SD_LISTEN_FDS_START`).
const FIRST: i32 = 3;

/// Takes those named so that `wanted` says yes, with their names, closed on exec from now on. Others are left alone.
/// The first call gets them; any later one gets nothing.
pub(crate) fn take(wanted: impl Fn(&str) -> bool) -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let numbered = (0..count).filter_map(|n| FIRST.checked_add(n)).zip(names.split(':'));
    let mine = numbered.filter(|(raw, name)| wanted(name) && is_open(*raw));
    let take = |(raw, name): (i32, &str)| {
        // SAFETY: open, as just checked; systemd made it for this process, nobody here has taken it before (the flag
        // above), and what is not `wanted` belongs to others and is not touched.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // If it cannot be marked, a child may inherit it: no harm to this process.
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        (name.to_owned(), fd)
    };
    mine.map(take).collect()
}

fn is_open(raw: i32) -> bool {
    // SAFETY: F_GETFD takes any number and touches nothing.
    unsafe { libc::fcntl(raw, libc::F_GETFD) >= 0 }
}
