//! The userfaultfd ioctls as the kernel lays them out (`include/uapi/linux/userfaultfd.h`, Linux 6.18).
//!
//! Issued here rather than through the `userfaultfd` crate where that loses the kernel's answer (COPY without
//! progress comes back as `PartiallyCopied(-11 as usize)`) or does not know the call (POISON, MOVE).

use std::os::fd::{AsRawFd, BorrowedFd};

pub(super) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(super) const API: u64 = 0xAA;

/// `struct uffdio_api`.
#[repr(C)]
pub(super) struct ApiCall {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_copy`; `struct uffdio_move` has the same layout.
#[repr(C)]
pub(super) struct CopyCall {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) progress: i64,
}

/// `struct uffdio_zeropage`; `uffdio_continue` and `uffdio_poison` have the same layout.
#[repr(C)]
pub(super) struct RangeCall {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) progress: i64,
}

const _: () = assert!(size_of::<ApiCall>() == 24);
const _: () = assert!(size_of::<CopyCall>() == 40);
const _: () = assert!(size_of::<RangeCall>() == 32);
const _: () = assert!(std::mem::offset_of!(CopyCall, progress) == 32);
const _: () = assert!(std::mem::offset_of!(RangeCall, progress) == 24);

/// `_IOWR(0xAA, number, size)`.
const fn read_write(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xAA << 8 | number
}

const UFFDIO_API: u64 = read_write(0x3F, size_of::<ApiCall>());
const UFFDIO_COPY: u64 = read_write(0x03, size_of::<CopyCall>());
const UFFDIO_ZEROPAGE: u64 = read_write(0x04, size_of::<RangeCall>());
const UFFDIO_MOVE: u64 = read_write(0x05, size_of::<CopyCall>());
const UFFDIO_POISON: u64 = read_write(0x08, size_of::<RangeCall>());

const _: () = assert!(UFFDIO_COPY == 0xc028_aa03);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
const _: () = assert!(UFFDIO_MOVE == 0xc028_aa05);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);

/// The calls that take a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangeOp {
    Zero,
    Poison,
}

/// Errno of a call that returned `rc`.
fn errno_of(rc: libc::c_int) -> Option<i32> {
    (rc < 0).then(|| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// Makes the API handshake; errno if it failed.
pub(super) fn api(fd: BorrowedFd<'_>, call: &mut ApiCall) -> Option<i32> {
    // SAFETY: UFFDIO_API reads and writes exactly one `struct uffdio_api`, whose layout ApiCall is (size
    // asserted above), and `call` is valid for both.
    errno_of(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, std::ptr::from_mut(call)) })
}

/// Installs `src` at `dst`, an address in the address space `fd` belongs to.
///
/// # Safety
/// `dst..dst + src.len()` must lie in a range whose owner registered it with `fd` to be filled by us. The
/// kernel fills only pages that are missing in such a range.
pub(super) unsafe fn copy(fd: BorrowedFd<'_>, dst: u64, src: &[u8]) -> (Option<i32>, i64) {
    let mut call = CopyCall { dst, src: src.as_ptr() as u64, len: src.len() as u64, mode: 0, progress: 0 };
    // SAFETY: UFFDIO_COPY reads and writes one `struct uffdio_copy` (layout asserted above), and reads
    // `src`, a live slice; what it writes at `dst` the caller answers for.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_COPY, &raw mut call) };
    (errno_of(rc), call.progress)
}

/// Asks for a copy from an address that can hold nothing, to hear whether the address space still lives.
/// EFAULT (or EEXIST) if so, ESRCH if not. Nothing can be installed by it.
pub(super) fn copy_from_nowhere(
    fd: BorrowedFd<'_>,
    dst: u64,
    nowhere: &super::mapping::Nowhere,
) -> Option<i32> {
    let mut call = CopyCall { dst, src: nowhere.addr(), len: nowhere.bytes(), mode: 0, progress: 0 };
    // SAFETY: as in `copy`, but the source is mapped without access rights for as long as `nowhere` lives,
    // so the kernel fails with EFAULT before it installs anything.
    errno_of(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_COPY, &raw mut call) })
}

/// Moves the pages at `src` in our address space to `dst`, leaving holes at `src`.
///
/// # Safety
/// As for [`copy`]; besides, `fd` must belong to our own address space, and `src..src + len` must be private
/// anonymous memory of which the caller holds the only use, and which it treats as lost afterwards.
pub(super) unsafe fn move_pages(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> (Option<i32>, i64) {
    let mut call = CopyCall { dst, src, len, mode: 0, progress: 0 };
    // SAFETY: UFFDIO_MOVE reads and writes one `struct uffdio_move` (layout asserted above); for the pages
    // at both ends the caller answers.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_MOVE, &raw mut call) };
    (errno_of(rc), call.progress)
}

/// Zero-fills or poisons a range.
///
/// # Safety
/// As for [`copy`].
pub(super) unsafe fn range(fd: BorrowedFd<'_>, op: RangeOp, start: u64, len: u64) -> (Option<i32>, i64) {
    let number = match op {
        RangeOp::Zero => UFFDIO_ZEROPAGE,
        RangeOp::Poison => UFFDIO_POISON,
    };
    let mut call = RangeCall { start, len, mode: 0, progress: 0 };
    // SAFETY: each of the two reads and writes one struct of RangeCall's layout (asserted above); for the
    // range the caller answers.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut call) };
    (errno_of(rc), call.progress)
}
