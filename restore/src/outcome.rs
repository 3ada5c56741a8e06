//! What the kernel's answer to an install means: one explicit table.
//!
//! Source: `fs/userfaultfd.c` of Linux 6.18 and userfaultfd(2). The ioctl fails with EAGAIN both when it made
//! *some* progress (the count is in the result field) and when it made none because a REMOVE event waits to
//! be read (the field then holds `-EAGAIN`, or what the caller left there).

/// The meaning of the kernel's answer to COPY, ZEROPAGE, POISON, MOVE or CONTINUE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is installed and waiters are woken.
    Done,
    /// This many pages (of the region's size) are installed; go on behind them.
    Partial(u64),
    /// EEXIST: a page sits at the first position; someone was first. Wake and go on behind it.
    AlreadyThere,
    /// EAGAIN: an event waits to be read. Drain events, then retry.
    Again,
    /// ESRCH: the VM's address space is gone.
    VmGone,
    /// ENOENT: the region is no longer registered or mapped; or the pages asked for lie in several mappings, and none was
    /// installed.
    RegionGone,
    /// ENOMEM: the host or its control group has no memory to give just now.
    NoMemory,
    /// EINVAL, ENOTTY or EOPNOTSUPP: this kernel or kind of memory cannot do that.
    Unsupported(i32),
    /// Anything else, by errno.
    Refused(i32),
}

/// Reads the kernel's answer.
///
/// `errno` is `None` if the ioctl succeeded; `progress_bytes` is its result field, `asked_bytes` the length
/// asked for and `page_bytes` the region's page size.
pub const fn classify(errno: Option<i32>, progress_bytes: i64, asked_bytes: u64, page_bytes: u64) -> Outcome {
    let pages = if progress_bytes > 0 { progress_bytes as u64 / page_bytes } else { 0 };
    match errno {
        None if progress_bytes < 0 => Outcome::Refused(-progress_bytes as i32),
        None if pages * page_bytes == asked_bytes => Outcome::Done,
        None | Some(libc::EAGAIN) if pages > 0 => Outcome::Partial(pages),
        None | Some(libc::EAGAIN) => Outcome::Again,
        Some(libc::EEXIST) => Outcome::AlreadyThere,
        Some(libc::ESRCH) => Outcome::VmGone,
        Some(libc::ENOENT) => Outcome::RegionGone,
        Some(libc::ENOMEM) => Outcome::NoMemory,
        Some(e @ (libc::EINVAL | libc::ENOTTY | libc::EOPNOTSUPP)) => Outcome::Unsupported(e),
        Some(e) => Outcome::Refused(e),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_answer_has_one_meaning() {
        let table = [
            (None, 8192, Outcome::Done),
            (None, 4096, Outcome::Partial(1)),
            (None, -22, Outcome::Refused(22)),
            (Some(libc::EAGAIN), 4096, Outcome::Partial(1)),
            (Some(libc::EAGAIN), -11, Outcome::Again),
            (Some(libc::EAGAIN), 0, Outcome::Again),
            (Some(libc::EEXIST), -17, Outcome::AlreadyThere),
            (Some(libc::ESRCH), -3, Outcome::VmGone),
            (Some(libc::ENOENT), -2, Outcome::RegionGone),
            (Some(libc::ENOMEM), -12, Outcome::NoMemory),
            (Some(libc::ENOTTY), 0, Outcome::Unsupported(libc::ENOTTY)),
            (Some(libc::EFAULT), -14, Outcome::Refused(libc::EFAULT)),
        ];
        for (errno, progress, meaning) in table {
            assert_eq!(classify(errno, progress, 8192, 4096), meaning, "{errno:?} {progress}");
        }
    }

    proptest! {
        #[test]
        fn progress_is_never_more_than_asked_for(errno in prop::option::of(0i32..200), pages in 0i64..600) {
            if let Outcome::Partial(n) = classify(errno, pages * 4096, 600 * 4096, 4096) {
                prop_assert_eq!(n as i64, pages);
                prop_assert!(n > 0);
            }
        }
    }
}
