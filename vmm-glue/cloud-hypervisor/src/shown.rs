//! Pages that a VMM shows its guest before it begins to ask.
//!
//! Once it is asked, a page costs a round trip, and the VMM asks for each page by itself. A page that is in its page tables
//! when it begins to guard its memory never faults. Between `Config`, with which it has mapped the memory files, and
//! `State`, with which it begins to guard them, it waits for this process. A byte of a page, read meanwhile through
//! `/proc/PID/mem`, makes the kernel enter the page, and those of the same 64 KiB that are in the file, in the VMM's page
//! tables, as if the VMM had read it.
//!
//! Only pages that are in the file are read: reading an absent one would put zeros there, for good.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

const PAGE: u64 = 4096;
/// Pages that the kernel enters with one that is read, where they are there: it may be told to enter fewer.
const AROUND: u64 = 16;
/// Bytes of an entry of `/proc/PID/pagemap`.
const ENTRY: usize = 8;
/// Pages whose entries are read at once.
const LOOK_PAGES: u64 = 4096;

/// A mapping of a file in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct View {
    start: u64,
    bytes: u64,
    file_offset: u64,
}

/// Has the kernel enter the pages that are in `file` in the page tables of process `pid`, which maps it and does not
/// guard it yet. How many of its pages are entered.
///
/// # Errors
/// The operating system's: reading another process's memory takes what tracing it takes. The VMM asks for what is not
/// shown, so this costs time and nothing else.
pub(super) fn show(file: &File, pid: i32) -> io::Result<u64> {
    let of = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let maps = std::fs::read_to_string(of("maps"))?;
    let (memory, pagemap) = (File::open(of("mem"))?, File::open(of("pagemap"))?);
    let meta = file.metadata()?;
    let mut shown = 0;
    for view in views(&maps, meta.dev(), meta.ino()) {
        let (mut at, end) = (view.file_offset, view.file_offset.saturating_add(view.bytes));
        while let Some((first, last)) = data(file, at, end)? {
            let address = view.start + (first - view.file_offset);
            shown += show_run(&memory, &pagemap, address, (last - first) / PAGE)?;
            at = last;
        }
    }
    Ok(shown)
}

/// Shows `pages` from `address` on, all of which are in the file.
fn show_run(memory: &File, pagemap: &File, address: u64, pages: u64) -> io::Result<u64> {
    let read = |page: u64| memory.read_exact_at(&mut [0], address + page * PAGE);
    let (mut page, mut shown) = (0, 0);
    while page < pages {
        read(page)?;
        page += AROUND - (address / PAGE + page) % AROUND;
    }
    let mut entries = vec![0; LOOK_PAGES.min(pages) as usize * ENTRY];
    for from in (0..pages).step_by(LOOK_PAGES as usize) {
        let some = LOOK_PAGES.min(pages - from) as usize;
        let entries = &mut entries[..some * ENTRY];
        pagemap.read_exact_at(entries, (address / PAGE + from) * ENTRY as u64)?;
        for (page, entry) in (from..).zip(entries.chunks_exact(ENTRY)) {
            // The highest bit says that it is there.
            if entry[ENTRY - 1] & 0x80 == 0 {
                read(page)?;
            }
            shown += 1;
        }
    }
    Ok(shown)
}

/// The first run of whole pages between `at` and `end` that is in the file.
fn data(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let first = match seek(file, SeekFrom::Data(at)) {
        Ok(first) => first / PAGE * PAGE,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let last = seek(file, SeekFrom::Hole(first))?.min(end) / PAGE * PAGE;
    Ok((first < last).then_some((first, last)))
}

/// The shared mappings of the file with these numbers in a `/proc/PID/maps`. Pure.
fn views(maps: &str, dev: u64, ino: u64) -> Vec<View> {
    let device = format!("{:02x}:{:02x}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let view = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (range, mode, offset) = (words.next()?, words.next()?, words.next()?);
        if words.next()? != device
            || words.next()?.parse() != Ok(ino)
            || !mode.starts_with("rw")
            || !mode.ends_with('s')
        {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end, file_offset) = (hex(start)?, hex(end)?, hex(offset)?);
        Some(View { start, bytes: end.checked_sub(start)?, file_offset })
    };
    maps.lines().filter_map(view).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_views_of_the_very_file_are_found() {
        let maps = "\
7f0000000000-7f0000200000 rw-s 00100000 00:01 77 /memfd:dormouse-memory (deleted)
7f0000200000-7f0000300000 rw-p 00000000 00:01 77 /memfd:dormouse-memory (deleted)
7f0000300000-7f0000400000 r--s 00000000 00:01 77 /memfd:dormouse-memory (deleted)
7f0000400000-7f0000500000 rw-s 00000000 00:01 78 /memfd:dormouse-memory (deleted)
7f0000500000-7f0000600000 rw-s 00000000 08:01 77 /home/of another
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
nonsense
";
        let dev = rustix::fs::makedev(0, 1);
        let only = View { start: 0x7f00_0000_0000, bytes: 0x20_0000, file_offset: 0x10_0000 };
        assert_eq!(views(maps, dev, 77), [only]);
    }

    #[test]
    fn what_is_in_the_file_is_shown_and_what_is_not_stays_absent() {
        let file =
            super::super::send::memory_file(&super::super::memory::StoredIn::All, 64 * PAGE).expect("a file");
        for page in [3, 4, 40] {
            file.write_all_at(&[7; PAGE as usize], page * PAGE).expect("write");
        }
        let mapping = dormouse_restore::Mapping::shared(&file, 0, 64).expect("mapped");
        assert_eq!(show(&file, std::process::id() as i32).expect("shown"), 3);
        let held = file.metadata().expect("metadata").blocks() * 512;
        assert_eq!(held, 3 * PAGE, "a page that was absent is there now, as zeros");
        drop(mapping);
    }
}
