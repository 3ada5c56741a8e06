//! Guest memory as one image: its regions one after another, in guest-physical order.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use super::SleepError;
use dormouse_vmm_common::DirtyRun;

const PAGE: u64 = 4096;
/// Copied at once where memory has to be copied.
const STEP: u64 = 1 << 20;

/// Guest memory over one shared memory file: [`super::Sleep`] stores it without copying it first.
///
/// `ranges` are (guest-physical start, bytes) in ascending order.
///
/// # Errors
/// The kernel's, or `InvalidInput` for ranges that overlap.
pub fn memory(ranges: &[(GuestAddress, usize)]) -> io::Result<GuestMemoryMmap> {
    let total: u64 = ranges.iter().map(|(_, bytes)| *bytes as u64).sum();
    let file = Arc::new(memory_file(total)?);
    let mut offset = 0;
    let with_files: Vec<_> = ranges
        .iter()
        .map(|&(start, bytes)| {
            let at = FileOffset::from_arc(Arc::clone(&file), offset);
            offset += bytes as u64;
            (start, bytes, Some(at))
        })
        .collect();
    GuestMemoryMmap::from_ranges_with_files(with_files)
        .map_err(|e: FromRangesError| io::Error::other(e.to_string()))
}

/// An empty, sparse memory file of `bytes` bytes.
fn memory_file(bytes: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("dormouse-guest", MemfdFlags::CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// Where each region lies in the image: (guest-physical start, offset in the image, bytes).
fn layout(memory: &GuestMemoryMmap) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    memory.iter().scan(0, |offset, region| {
        let at = *offset;
        *offset += region.len();
        Some((region.start_addr().0, at, region.len()))
    })
}

/// Bytes of the whole image.
fn image_bytes(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// The image pages of `dirty`, which may reach across regions that touch.
pub(super) fn image_ranges(
    memory: &GuestMemoryMmap,
    dirty: &[DirtyRun],
) -> Result<Vec<Range<u64>>, SleepError> {
    let mut ranges = Vec::with_capacity(dirty.len());
    for run in dirty {
        let (mut at, end) = (run.physical, run.physical.saturating_add(run.bytes));
        while at < end {
            let region = layout(memory).find(|&(start, _, bytes)| (start..start + bytes).contains(&at));
            let (start, offset, bytes) = region.ok_or(SleepError::DirtyOutside { physical: at })?;
            let stop = end.min(start + bytes);
            let (from, to) = (offset + (at - start), offset + (stop - start));
            ranges.push(from / PAGE..to.div_ceil(PAGE));
            at = stop;
        }
    }
    Ok(ranges)
}

/// A file that reads as the image, at least where it is asked for, and its path in this process.
pub(super) struct ImageFile {
    file: Arc<File>,
}

impl ImageFile {
    /// The image of `memory`: its own file where it has one of just this shape, a copy otherwise. Of a copy, only
    /// `ranges` (in image pages) are filled if given.
    pub(super) fn of(memory: &GuestMemoryMmap, ranges: Option<&[Range<u64>]>) -> Result<Self, SleepError> {
        if let Some(file) = own_file(memory) {
            return Ok(Self { file });
        }
        let file = memory_file(image_bytes(memory)).map_err(SleepError::File)?;
        let whole = 0..image_bytes(memory).div_ceil(PAGE);
        for range in ranges.unwrap_or(std::slice::from_ref(&whole)) {
            copy(memory, &file, range.start * PAGE..range.end * PAGE)?;
        }
        Ok(Self { file: Arc::new(file) })
    }

    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// The file behind all regions, if they are shared mappings of one and lie in it as in the image.
fn own_file(memory: &GuestMemoryMmap) -> Option<Arc<File>> {
    let first = memory.iter().next()?.file_offset()?.arc().clone();
    if first.metadata().ok()?.len() != image_bytes(memory) {
        return None;
    }
    let mut offset = 0;
    for region in memory.iter() {
        let at = region.file_offset()?;
        let shared = region.get_mmap().flags() & libc::MAP_SHARED != 0;
        if !shared || !Arc::ptr_eq(at.arc(), &first) || at.start() != offset {
            return None;
        }
        offset += region.len();
    }
    Some(first)
}

/// Copies bytes `range` of the image into `file`, leaving zero pages as holes.
fn copy(memory: &GuestMemoryMmap, file: &File, range: Range<u64>) -> Result<(), SleepError> {
    let mut buffer = vec![0u8; STEP as usize];
    for (region, (_, offset, bytes)) in memory.iter().zip(layout(memory)) {
        let (mut at, end) = (range.start.max(offset), range.end.min(offset + bytes));
        while at < end {
            let step = STEP.min(end - at);
            let buffer = &mut buffer[..step as usize];
            region.read_slice(buffer, MemoryRegionAddress(at - offset))?;
            for (index, page) in buffer.chunks(PAGE as usize).enumerate() {
                if page.iter().any(|&b| b != 0) {
                    file.write_all_at(page, at + index as u64 * PAGE).map_err(SleepError::File)?;
                }
            }
            at += step;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH: u64 = 1 << 32;

    #[test]
    fn memory_over_one_file_is_stored_in_place_and_other_memory_is_copied() {
        let ranges = [(GuestAddress(0), 3 * 4096), (GuestAddress(HIGH), 2 * 4096)];
        let in_place = memory(&ranges).expect("memory");
        let copied = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
        for memory in [&in_place, &copied] {
            memory.write_obj(0x11u8, GuestAddress(4096)).expect("write");
            memory.write_obj(0x22u8, GuestAddress(HIGH + 4096)).expect("write");
            let image = ImageFile::of(memory, None).expect("image");
            let bytes = std::fs::read(image.path()).expect("read");
            assert_eq!((bytes.len(), bytes[4096], bytes[4 * 4096]), (5 * 4096, 0x11, 0x22));
        }
        assert!(own_file(&in_place).is_some() && own_file(&copied).is_none());
    }

    #[test]
    fn dirty_pages_are_those_of_the_image() {
        let memory = memory(&[(GuestAddress(0), 8192), (GuestAddress(HIGH), 8192)]).expect("memory");
        let run = |physical, bytes| DirtyRun { physical, bytes };
        let ranges = image_ranges(&memory, &[run(4096, 4096), run(HIGH, 8192)]).expect("inside");
        assert_eq!(ranges, [1..2, 2..4]);
        assert!(matches!(
            image_ranges(&memory, &[run(4096, 8192)]),
            Err(SleepError::DirtyOutside { physical: 8192 })
        ));
    }
}
