//! Files in memory that Firecracker can open by path: what it writes to them never touches a disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom as Find};

/// A nameless file in memory, gone with the last process that holds it.
#[derive(Debug)]
pub struct MemFile {
    file: File,
    /// Where a VMM sees it that does not see this process's `/proc`.
    seen_as: Option<PathBuf>,
}

impl MemFile {
    /// An empty one. `name` is for people who look into `/proc`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Self { file: rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into(), seen_as: None })
    }

    /// One that holds `bytes`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn holding(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let mut made = Self::new(name)?;
        made.file.write_all(bytes)?;
        Ok(made)
    }

    /// `file`, which is in memory and has a path where a VMM is.
    pub(super) fn seen_as(file: File, path: PathBuf) -> Self {
        Self { file, seen_as: Some(path) }
    }

    /// Gives it `bytes` of memory at once, charged to this process.
    ///
    /// # Errors
    /// There is not so much; it holds less then.
    pub fn allocate(&self, bytes: u64) -> io::Result<()> {
        /// A signal undoes the piece that is being allocated, and no more.
        const PIECE: u64 = 64 << 20;
        let mut at = 0;
        while at < bytes {
            let piece = PIECE.min(bytes - at);
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), at, piece) {
                Err(rustix::io::Errno::INTR) => {}
                allocated => {
                    allocated?;
                    at += piece;
                }
            }
        }
        Ok(())
    }

    pub(super) fn as_file(&self) -> &File {
        &self.file
    }

    /// The path by which the VMM it was made for can open it.
    pub fn path_for_vmm(&self) -> PathBuf {
        self.seen_as.clone().unwrap_or_else(|| self.path())
    }

    /// A path by which this process, and others of its user that see the same `/proc`, can open it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Its whole content.
    ///
    /// # Errors
    /// Reading failed.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Its length, holes included.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Whether nothing was written to it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The pages of 4 KiB that were written, ascending; others are holes.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn written_pages(&self) -> io::Result<Vec<Range<u64>>> {
        const PAGE: u64 = 4096;
        let (mut runs, mut at): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
        loop {
            let start = match rustix::fs::seek(&self.file, Find::Data(at)) {
                Ok(start) => start,
                // No data from there on.
                Err(rustix::io::Errno::NXIO) => return Ok(runs),
                Err(error) => return Err(error.into()),
            };
            at = rustix::fs::seek(&self.file, Find::Hole(start))?;
            runs.push(start / PAGE..at.div_ceil(PAGE));
        }
    }

    /// Memory it takes up.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn stored_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

/// Whether such files keep exact holes here: whether what was not written reads as a hole, page by page.
///
/// A difference snapshot relies on it, as its holes stand for pages of the parent. Where the kernel backs
/// these files with transparent huge pages, writing one page makes data of its neighbours, all zero.
pub fn holes_are_exact() -> bool {
    no_huge_pages() && probe().unwrap_or(false)
}

/// Writes lone pages and looks whether each is alone.
fn probe() -> io::Result<bool> {
    const HUGE: u64 = 2 << 20;
    let scratch = MemFile::new("dormouse-probe")?;
    scratch.file.set_len(4 * HUGE)?;
    for at in [HUGE + 0x5000, 3 * HUGE] {
        scratch.file.write_all_at(&[1; 4096], at)?;
        let start = rustix::fs::seek(&scratch.file, Find::Data(at & !(HUGE - 1)))?;
        let end = rustix::fs::seek(&scratch.file, Find::Hole(at))?;
        if (start, end) != (at, at + 4096) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the kernel is set up not to use huge pages for files in memory unless asked. The probe alone could
/// be lucky: huge pages are not always to be had.
fn no_huge_pages() -> bool {
    let chosen = |text: &str| text.split_once('[').and_then(|(_, t)| Some(t.split_once(']')?.0.to_owned()));
    let harmless = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok();
        // Kernels without huge pages do not have the file.
        text.is_none_or(|t| {
            chosen(&t).is_some_and(|c| ["never", "advise", "deny", "inherit"].contains(&c.as_str()))
        })
    };
    let root = PathBuf::from("/sys/kernel/mm/transparent_hugepage");
    let sizes = std::fs::read_dir(&root).into_iter().flatten().flatten().map(|e| e.path());
    harmless(root.join("shmem_enabled")) && sizes.map(|p| p.join("shmem_enabled")).all(harmless)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_found_between_holes() {
        if !holes_are_exact() {
            dormouse_testkit::skipped!("files in memory have no exact holes here");
            return;
        }
        let file = MemFile::new("dormouse-test").expect("file");
        assert_eq!(file.written_pages().expect("runs"), []);
        file.file.set_len(100 * 4096).expect("length");
        for page in [3, 4, 50] {
            file.file.write_all_at(&[1; 4096], page * 4096).expect("write");
        }
        assert_eq!(file.written_pages().expect("runs"), [3..5, 50..51]);
    }

    #[test]
    fn allocated_memory_is_there_and_reads_as_zeros() {
        let file = MemFile::new("dormouse-test").expect("file");
        let bytes = (64 << 20) + 4096;
        file.allocate(bytes).expect("allocated");
        assert_eq!((file.len().expect("length"), file.stored_bytes().expect("blocks")), (bytes, bytes));
        let mut last = [1; 4096];
        file.file.read_exact_at(&mut last, bytes - 4096).expect("read");
        assert_eq!(last, [0; 4096]);
    }
}
