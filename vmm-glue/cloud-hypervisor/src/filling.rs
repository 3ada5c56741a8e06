//! Memory files that are still being filled, told from those that are whole.
//!
//! A page that has not come yet reads as zero in the file. So a file is locked until it is whole. The lock belongs to the
//! open file that the VMM is given, and not to the process that fills it: should that be killed, the file stays locked for
//! as long as the VM lives.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::FileType;

/// From here on `file` has pages to come.
///
/// # Errors
/// The kernel refused.
pub(super) fn begin(file: &File) -> io::Result<()> {
    file.try_lock().map_err(io::Error::from)
}

/// All pages of `file` have come.
pub(super) fn end(file: &File) {
    if let Err(error) = file.unlock() {
        tracing::warn!(%error, "a memory file is whole and counts as one that is still filled");
    }
}

/// Whether `file` has pages to come. What is no file on a file system has none.
///
/// # Errors
/// That cannot be told.
pub(super) fn is_going_on(file: &OwnedFd) -> io::Result<bool> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
    if kind != FileType::RegularFile {
        return Ok(false);
    }
    // Opened anew, as what was received may be the very open file that holds the lock.
    let seen = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    match seen.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
