//! Room kept back in a local directory, so that a full disk can be freed.
//!
//! To free a disk, the collector writes first: its lease, and a mark for each object that it deletes. Where not a block or
//! an inode is left, that fails, and the disk stays full. So a few files of a few blocks lie beside the store's objects
//! and mean nothing: the collector deletes them when it finds the disk full, and whoever finds them gone writes them again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// How many files there are: each frees an inode as well.
const FILES: usize = 12;
/// Bytes of each: two blocks of most file systems.
const FILE_BYTES: usize = 8 << 10;

fn paths(root: &Path) -> impl DoubleEndedIterator<Item = PathBuf> {
    (0..FILES).map(move |n| root.join(format!("reserve-{n}")))
}

/// Keeps room back, unless it is kept already.
pub(super) fn keep(root: &Path) -> io::Result<()> {
    // The last one is written last and let go of first.
    if paths(root).next_back().is_some_and(|last| last.exists()) {
        return Ok(());
    }
    let mut bytes = vec![0; FILE_BYTES];
    for path in paths(root) {
        // Nothing that a file system could compress.
        blake3::Hasher::new().update(path.as_os_str().as_encoded_bytes()).finalize_xof().fill(&mut bytes);
        fs::write(path, &bytes)?;
    }
    Ok(())
}

/// Lets it go; whether there was any.
pub(super) fn release(root: &Path) -> bool {
    // Each of them, whatever became of the others.
    paths(root).rev().filter(|path| fs::remove_file(path).is_ok()).count() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_let_go_is_kept_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!release(dir.path()));
        for _ in 0..2 {
            keep(dir.path()).unwrap();
            keep(dir.path()).unwrap();
            assert!(paths(dir.path()).all(|path| fs::metadata(path).unwrap().len() == FILE_BYTES as u64));
            assert!(release(dir.path()));
            assert!(!release(dir.path()));
        }
    }
}
