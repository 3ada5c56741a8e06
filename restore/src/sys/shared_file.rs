//! A file in memory that other processes may hold open, mapped: what is in it outlives this process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::mm::mlock;

/// Between two tries to become its only user.
const LOCK_INTERVAL: Duration = Duration::from_millis(1);

/// A file in memory (`memfd`) of fixed size, mapped shared, and used by one process at a time.
///
/// Its size is sealed, so that no other holder can make access to it a fault. Its bytes are only ever read and
/// written as atomics, never lent out as slices: another holder may write to them.
#[derive(Debug)]
pub struct SharedFile {
    /// What others are given: a description of its own, so that they do not share the lock.
    shared: OwnedFd,
    /// Holds the lock, as does the mapping made from it: both go with the last thread of this process.
    _locked: OwnedFd,
    map: MmapRaw,
}

/// Why such a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SharedFileError {
    /// Another process uses it.
    #[error("another process uses it; it would have to end first")]
    InUse,
    /// It is of another kind.
    #[error("it is not a file in memory of fixed size")]
    NotSealed,
    /// It cannot be mapped.
    #[error("its size of {0} bytes is not that of whole pages")]
    Size(u64),
    /// The operating system refused.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's word.
        error: io::Error,
    },
}

fn io<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> SharedFileError {
    move |error| SharedFileError::Io { what, error: error.into() }
}

impl SharedFile {
    /// A new one of `bytes` bytes, all zero, that takes up no memory until it is written to. `name` is for people
    /// who look into `/proc`.
    pub fn create(name: &str, bytes: u64) -> Result<Self, SharedFileError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(io("making a file in memory"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(io("giving it its size"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(io("sealing its size"))?;
        Self::open(fd, Duration::ZERO)
    }

    /// One that was made before, perhaps by a process that is gone. Waits up to `patience` for a process that still
    /// uses it to be gone: until then that process's last system calls may be under way.
    pub fn open(fd: OwnedFd, patience: Duration) -> Result<Self, SharedFileError> {
        // Anything but a memfd answers EINVAL.
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| SharedFileError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(SharedFileError::NotSealed);
        }
        let size = rustix::fs::fstat(&fd).map_err(io("asking for its size"))?.st_size;
        let bytes = usize::try_from(size).ok().filter(|b| *b > 0 && b.is_multiple_of(4096));
        let bytes = bytes.ok_or(SharedFileError::Size(size as u64))?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let locked = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(io("opening it once more"))?;
        lock(&locked, patience)?;
        let map = MmapOptions::new().len(bytes).map_raw(&locked).map_err(io("mapping it"))?;
        Ok(SharedFile { shared: fd, _locked: locked, map })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// The byte at `at`.
    pub fn byte(&self, at: u64) -> Option<&AtomicU8> {
        let at = usize::try_from(at).ok().filter(|at| *at < self.map.len())?;
        // SAFETY: inside the mapping, as just checked.
        let byte = unsafe { self.map.as_mut_ptr().add(at) };
        // SAFETY: the mapping lives as long as `self`, its size is sealed, and its bytes are only accessed atomically.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }

    /// Copies the bytes from `at` on to `into`; false if they are not all inside.
    pub fn read(&self, at: u64, into: &mut [u8]) -> bool {
        let inside = at.checked_add(into.len() as u64).is_some_and(|end| end <= self.bytes());
        if inside {
            for (byte, at) in into.iter_mut().zip(at..) {
                *byte = self.byte(at).map_or(0, |b| b.load(Ordering::Relaxed));
            }
        }
        inside
    }

    /// Copies `from` to the bytes from `at` on; false if they are not all inside.
    pub fn write(&self, at: u64, from: &[u8]) -> bool {
        let inside = at.checked_add(from.len() as u64).is_some_and(|end| end <= self.bytes());
        if inside {
            for (byte, at) in from.iter().zip(at..) {
                if let Some(to) = self.byte(at) {
                    to.store(*byte, Ordering::Relaxed);
                }
            }
        }
        inside
    }

    /// The stretches that were written to, from `at` on: what lies between them is zero, and looking at it would
    /// take up memory.
    pub fn written(&self, at: u64) -> Result<Vec<std::ops::Range<u64>>, SharedFileError> {
        let (mut found, mut at) = (Vec::new(), at);
        loop {
            let start = match rustix::fs::seek(&self._locked, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => return Ok(found),
                Err(error) => return Err(io("looking for what was written")(error)),
            };
            let end = rustix::fs::seek(&self._locked, SeekFrom::Hole(start));
            at = end.map_err(io("looking for what was written"))?;
            found.push(start..at);
        }
    }

    /// Has the kernel keep the pages of `at..at + bytes` in memory.
    pub fn keep_in_memory(&self, at: u64, bytes: u64) -> io::Result<()> {
        let end = at.checked_add(bytes).filter(|end| bytes > 0 && *end <= self.bytes());
        let (Some(_), Some(first)) = (end, self.byte(at)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: the range lies inside the mapping; locking it changes no byte.
        unsafe { mlock(std::ptr::from_ref(first).cast_mut().cast(), bytes as usize) }?;
        Ok(())
    }

    /// Reads from `fd` straight into the bytes `at..at + room`, as one system call: what the kernel has handed over
    /// is there whatever becomes of this process.
    pub fn read_from(&self, fd: BorrowedFd<'_>, at: u64, room: usize) -> io::Result<usize> {
        let end = at.checked_add(room as u64).filter(|end| *end <= self.bytes());
        let (Some(_), Some(first)) = (end, self.byte(at)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: the range lies inside the mapping, of which no reference to plain bytes exists; atomics that others
        // read meanwhile see old bytes or new ones.
        let got = unsafe { libc::read(fd.as_raw_fd(), std::ptr::from_ref(first).cast_mut().cast(), room) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// For whoever keeps the file beyond this process.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }
}

fn lock(file: &OwnedFd, patience: Duration) -> Result<(), SharedFileError> {
    let deadline = Instant::now() + patience;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                return Err(SharedFileError::InUse);
            }
            Err(error) => return Err(io("locking it")(error)),
        }
    }
}
