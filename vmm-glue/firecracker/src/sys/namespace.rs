//! Work among the files that another process sees.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread::Builder;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Does `work` in a mount namespace, on a thread of its own that ends with it.
///
/// # Errors
/// That takes CAP_SYS_ADMIN and CAP_SYS_CHROOT; or `work` failed.
pub(crate) fn in_mount_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let there = || {
        // SAFETY: FS takes apart this thread's root, working directory and umask, and nothing that any descriptor or
        // memory depends on; the thread ends below and takes its own with it.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = Builder::new().name("dm-mount".into()).spawn_scoped(scope, there)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
