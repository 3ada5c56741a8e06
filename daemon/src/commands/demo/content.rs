//! Bytes of this computer's own files: programs, libraries and texts, as a machine's page cache holds them.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

/// Most bytes taken of one file.
const OF_ONE_FILE: u64 = 2 << 20;
/// Smaller files are left out.
const FILE_BYTES_MIN: u64 = 16 << 10;
/// Most files looked at.
const FILES_MAX: usize = 4000;
const PAGE: usize = 4096;

/// Up to `bytes` bytes, each file beginning on a page. Less if there are not enough files; never more.
pub(super) fn gather(bytes: usize) -> Vec<u8> {
    let mut content = Vec::with_capacity(bytes);
    for path in files() {
        if content.len() >= bytes {
            break;
        }
        let Ok(file) = File::open(&path) else { continue };
        // A file that cannot be read is one less.
        let _ = file.take(OF_ONE_FILE).read_to_end(&mut content);
        content.resize(content.len().next_multiple_of(PAGE), 0);
    }
    content.truncate(bytes);
    content
}

/// This program first; then libraries, programs and texts by turns.
fn files() -> Vec<PathBuf> {
    let mut kinds = ["/usr/lib", "/usr/bin", "/usr/share", "/etc"].map(|dir| {
        let mut found = Vec::new();
        find(Path::new(dir), 5, &mut found);
        found.sort();
        found.into_iter()
    });
    let mut all: Vec<PathBuf> = std::env::current_exe().into_iter().collect();
    loop {
        let before = all.len();
        all.extend(kinds.iter_mut().filter_map(Iterator::next));
        if all.len() == before {
            return all;
        }
    }
}

fn find(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if found.len() >= FILES_MAX {
            return;
        }
        if kind.is_dir() && depth > 0 {
            find(&entry.path(), depth - 1, found);
        } else if kind.is_file() && entry.metadata().is_ok_and(|m| m.len() >= FILE_BYTES_MIN) {
            found.push(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_something_on_every_computer() {
        let content = super::gather(1 << 20);
        assert!(content.len() >= 64 << 10 && content.len() <= 1 << 20);
        assert!(content.chunks(4096).filter(|page| page.iter().any(|&b| b != 0)).count() > 10);
    }
}
