//! What the peer asks of the kernel, as Cloud Hypervisor does (`vmm/src/uffd.rs`).
#![allow(unsafe_code, reason = "what the kernel is asked for has no safe call")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

const USER_MODE_ONLY: i32 = 1;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_SHMEM: u64 = 1 << 10;
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 4;

/// Memory of a file, mapped shared.
pub(crate) struct Mapped {
    start: *mut AtomicU64,
    bytes: usize,
}

// SAFETY: all access goes through atomics, and the mapping lives as long as the value.
unsafe impl Send for Mapped {}
// SAFETY: as for Send.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub(crate) fn new(file: &File, offset: u64, bytes: u64) -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset as i64,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Mapped { start: start.cast(), bytes: bytes as usize }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset as usize + 8 <= self.bytes);
        // SAFETY: inside the mapping, as checked above.
        let word = unsafe { self.start.add(offset as usize / 8) };
        // SAFETY: aligned, mapped as long as `self`, and only ever accessed atomically by us.
        unsafe { &*word }
    }

    /// Waits for the page if it is absent.
    pub(crate) fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    pub(crate) fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// Gives pages of a file back, as a balloon does.
pub(crate) fn punch(file: &File, offset: u64, bytes: u64) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes no memory of ours.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, bytes as i64) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
    mode: u64,
    answer: u64,
}

/// The VMM's userfaultfd.
pub(crate) struct Guard(OwnedFd);

impl Guard {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the call takes flags and gives a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it for us.
        let guard = Guard(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = [0xAA_u64, MISSING_SHMEM | MINOR_SHMEM, 0];
        guard.call(0xc018_aa3f, api.as_mut_ptr().cast())?;
        Ok(guard)
    }

    fn call(&self, number: u64, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: each caller passes the structure its number takes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Missing and minor faults, as Cloud Hypervisor registers shared memory.
    pub(crate) fn register(&self, memory: &Mapped) -> io::Result<()> {
        let (start, bytes) = (memory.address(), memory.bytes as u64);
        let mut range = Range { start, bytes, mode: MODE_MISSING | MODE_MINOR, answer: 0 };
        self.call(0xc020_aa00, (&raw mut range).cast())
    }

    /// Lets the guest see a page that is in the file; the error is the kernel's if it is not.
    pub(crate) fn go_on(&self, address: u64, bytes: u64) -> io::Result<()> {
        let mut range = Range { start: address, bytes, mode: 0, answer: 0 };
        match self.call(0xc020_aa07, (&raw mut range).cast()) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let mut range = [address, bytes];
                self.call(0x8010_aa02, range.as_mut_ptr().cast())
            }
            done => done,
        }
    }

    /// The address of the next fault; `None` if there is none within `wait_ms`.
    pub(crate) fn fault(&self, wait_ms: i32) -> Option<u64> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, as said.
        if unsafe { libc::poll(&raw mut poll, 1, wait_ms) } < 1 {
            return None;
        }
        let mut message = [0_u64; 4];
        // SAFETY: as many bytes as a message has.
        let read = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        (read == 32 && message[0] & 0xff == 0x12).then_some(message[2])
    }
}
