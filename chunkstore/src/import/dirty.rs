//! Which pages of an image are to be looked at: ranges, a bitmap, or what a sparse file has data for.

use std::{fs::File, ops::Range, os::unix::fs::MetadataExt as _, path::Path};

use dormouse_core::{PAGE_BYTES, PageCount};
use rustix::fs::SeekFrom;

use crate::error::{Result, StoreError};

/// The ranges, sorted and merged.
pub(super) fn normalise(ranges: &[Range<u64>], pages: u64, path: &Path) -> Result<Vec<Range<u64>>> {
    let mut sorted: Vec<_> = ranges.iter().filter(|r| !r.is_empty()).cloned().collect();
    sorted.sort_by_key(|r| r.start);
    if let Some(bad) = sorted.iter().find(|r| r.end > pages) {
        let why = format!(
            "dirty pages {}..{} are outside {}, which has {pages} pages",
            bad.start,
            bad.end,
            path.display()
        );
        return Err(StoreError::Usage(why));
    }
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

/// The ranges of pages whose bits are set.
pub(super) fn ranges_of(bits: &[u8], pages: u64, path: &Path) -> Result<Vec<Range<u64>>> {
    let least = pages.div_ceil(8);
    let most = pages.div_ceil(64) * 8;
    if !(least..=most).contains(&(bits.len() as u64)) {
        let why = format!(
            "the dirty bitmap for {} has {} bytes; its {pages} pages of 4 KiB take {least}, or {most} in whole words of 64 \
             bits",
            path.display(),
            bits.len()
        );
        return Err(StoreError::Usage(why));
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (first, byte) in (0u64..).step_by(8).zip(bits).filter(|(_, byte)| **byte != 0) {
        for page in (0..8).filter(|bit| byte & (1 << bit) != 0).map(|bit| first + bit) {
            match ranges.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => ranges.push(page..page + 1),
            }
        }
    }
    if let Some(last) = ranges.last().filter(|last| last.end > pages) {
        let why = format!(
            "the dirty bitmap for {} has a bit for page {}, but there are {pages} pages",
            path.display(),
            last.end - 1
        );
        return Err(StoreError::Usage(why));
    }
    Ok(ranges)
}

/// The pages a sparse file has data for.
pub(super) fn data_pages(file: &File, bytes: u64, path: &Path) -> Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < bytes {
        let error = |e: rustix::io::Errno| StoreError::file("finding the holes of", path, e.into());
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(error(e)),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).map_err(error)?;
        ranges.push(start / PAGE_BYTES as u64..end.div_ceil(PAGE_BYTES as u64));
        at = end.max(start + 1);
    }
    let ranges = normalise(&ranges, PageCount::covering(bytes).0, path)?;
    let blocks = file.metadata().map_err(|e| StoreError::file("reading", path, e))?.blocks();
    if tells_no_holes(&ranges, bytes, blocks) {
        let why = format!(
            "the file system of {} does not tell which parts of it are holes: all of it is shown as data, yet it takes \
             {} of {bytes} bytes. Say what changed with --dirty or --dirty-bitmap",
            path.display(),
            blocks.saturating_mul(BLOCK_BYTES)
        );
        return Err(StoreError::Usage(why));
    }
    Ok(ranges)
}

/// Whether a file is shown to have no hole though it has less space than bytes: then its file system knows no holes, and
/// what is shown as data may be one. A file system that compresses may be taken for such a one, which does no harm.
fn tells_no_holes(ranges: &[Range<u64>], bytes: u64, blocks: u64) -> bool {
    matches!(ranges, [all] if *all == (0..PageCount::covering(bytes).0))
        && blocks.saturating_mul(BLOCK_BYTES) < bytes
}

/// What `st_blocks` counts, whatever a file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_lowest_bit_of_a_byte_is_its_first_page() {
        let ranges = |bits: &[u8], pages| ranges_of(bits, pages, Path::new("m")).unwrap();
        assert_eq!(ranges(&[0b0000_0011], 8).first(), Some(&(0..2)));
        assert_eq!(ranges(&[0b1000_0000, 0b0000_0111, 0, 0xff], 32), [7..11, 24..32]);
        assert_eq!(ranges(&[0b0000_0101, 0, 0, 0, 0, 0, 0, 0], 3), [0..1, 2..3], "a word of 64 bits");
        assert_eq!(ranges(&[], 0), []);
    }

    #[test]
    fn a_bitmap_of_another_size_or_with_bits_past_the_end_is_refused() {
        let error = |bits: &[u8], pages| ranges_of(bits, pages, Path::new("m")).unwrap_err().to_string();
        assert!(error(&[0; 3], 32).contains("has 3 bytes; its 32 pages of 4 KiB take 4, or 8"));
        assert!(error(&[0; 9], 32).contains("has 9 bytes"));
        assert!(error(&[0, 0, 0, 0x10], 28).contains("a bit for page 28, but there are 28 pages"));
    }

    #[test]
    fn one_extent_over_a_file_that_takes_less_is_no_answer() {
        assert!(tells_no_holes(from_ref(&(0..256)), 256 * 4096, 0), "ramfs counts no blocks at all");
        assert!(tells_no_holes(from_ref(&(0..256)), 256 * 4096, 16), "two pages of 256 were written");
        assert!(!tells_no_holes(from_ref(&(0..256)), 256 * 4096, 256 * 8), "a diff of all pages");
        assert!(!tells_no_holes(&[0..1, 255..256], 256 * 4096, 16), "holes are told");
        assert!(!tells_no_holes(from_ref(&(0..1)), 256 * 4096, 8), "the rest is a hole");
        assert!(!tells_no_holes(&[], 0, 0), "an empty file");
    }

    proptest! {
        #[test]
        fn ranges_and_bits_say_the_same(bits: Vec<u8>) {
            let pages = bits.len() as u64 * 8;
            let ranges = ranges_of(&bits, pages, Path::new("m")).unwrap();
            let mut again = vec![0u8; bits.len()];
            for page in ranges.iter().cloned().flatten() {
                again[page as usize / 8] |= 1 << (page % 8);
            }
            prop_assert_eq!(again, bits);
            prop_assert_eq!(normalise(&ranges, pages, Path::new("m")).unwrap(), ranges);
        }
    }
}
