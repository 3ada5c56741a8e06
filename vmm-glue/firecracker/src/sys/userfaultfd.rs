//! A bare userfaultfd, for tests that have to hand one over.

use std::os::fd::OwnedFd;

/// A userfaultfd that guards nothing.
///
/// # Errors
/// The kernel's; `EPERM` where unprivileged processes may not have one.
pub(crate) fn create() -> rustix::io::Result<OwnedFd> {
    // SAFETY: the descriptor guards no memory until memory is registered with it, which nothing does.
    unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) }
}
