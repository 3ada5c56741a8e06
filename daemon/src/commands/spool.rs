//! Standard input as a file: imports read out of order, and more than once if they must.

use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Read, Seek as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
};

use dormouse_core::{PAGE_BYTES, page::is_zero};

use crate::failure::Failure;

/// What stands for standard input and standard output where a file is named.
pub(crate) const STREAM: &str = "-";
/// Read at a time: all of the spool that is in memory.
const CHUNK_BYTES: usize = 1 << 20;

/// Standard input.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
}

impl Spool {
    /// Standard input itself if it is a file that nobody has read from; else a copy of all of it, in a file without a name
    /// in `dir`, with holes where it is zero. It is gone when this is dropped, and when this process ends.
    pub(crate) fn stdin(dir: &Path) -> Result<Self, Failure> {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(Failure::usage(
                "- is standard input, and that is a terminal; connect a file or a pipe to it",
            ));
        }
        let error = |e: io::Error| Failure::file("reading", Path::new("standard input"), &e);
        let mut input = File::from(stdin.as_fd().try_clone_to_owned().map_err(error)?);
        if input.metadata().map_err(error)?.is_file() && input.stream_position().map_err(error)? == 0 {
            return Ok(Spool { file: input });
        }
        let full = |e: io::Error| Failure::file("spooling standard input in", dir, &e);
        fs::create_dir_all(dir).map_err(full)?;
        let file = tempfile::tempfile_in(dir).map_err(full)?;
        copy(&mut input, &file, error, full)?;
        Ok(Spool { file })
    }

    /// A path of the file, as long as this lives.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// Copies to the end, leaving out pages of zeros.
fn copy(
    from: &mut impl Read,
    to: &File,
    read_failed: impl Fn(io::Error) -> Failure,
    write_failed: impl Fn(io::Error) -> Failure,
) -> Result<(), Failure> {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    let mut at = 0;
    loop {
        chunk.clear();
        from.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk).map_err(&read_failed)?;
        if chunk.is_empty() {
            return to.set_len(at).map_err(write_failed);
        }
        for page in chunk.chunks(PAGE_BYTES) {
            if page.len() < PAGE_BYTES || !is_zero(page) {
                to.write_all_at(page, at).map_err(&write_failed)?;
            }
            at += page.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_same_and_has_holes_for_zeros() {
        use std::os::unix::fs::MetadataExt as _;
        let mut bytes = vec![0u8; 3 * CHUNK_BYTES + 17];
        bytes[CHUNK_BYTES + 5000] = 1;
        *bytes.last_mut().expect("there are some") = 2;
        let file = tempfile::tempfile().expect("a file");
        copy(&mut &bytes[..], &file, |e| panic!("{e}"), |e| panic!("{e}")).expect("copied");
        let meta = file.metadata().expect("its length");
        assert_eq!(meta.len(), bytes.len() as u64);
        assert!(meta.blocks() * 512 < CHUNK_BYTES as u64, "{} blocks", meta.blocks());
        let mut back = vec![9; bytes.len()];
        file.read_exact_at(&mut back, 0).expect("read back");
        assert!(back == bytes);
    }
}
