//! Reading and hashing: the parallel first stage of an import.
//!
//! Workers take blocks of 1 MiB in image order and hash every page that is not zero. What is not dirty is no block, and
//! neither is a hole where there was nothing before: an image costs what it has data for, however large it is. Blocks
//! arrive at the next stage out of order by at most the number of workers.

use std::{
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

use crossbeam::channel::Receiver;
use dormouse_core::{ChunkId, Domain, IMAGE_PAGES_MAX, PAGE_BYTES, PageCount, SECTION_PAGES, page::is_zero};
use rustix::fs::SeekFrom;

use super::{
    dirty::{data_pages, normalise, ranges_of},
    request::{Dirty, ImageSource},
    watched::Watched,
};
use crate::error::{Result, StoreError};

/// Pages in a block: 1 MiB.
pub(crate) const BLOCK_PAGES: u64 = 256;

/// An image file opened for import.
#[derive(Debug)]
pub(crate) struct ImageFile {
    watched: Watched,
    pub(crate) bytes: u64,
    /// Ranges of dirty pages, sorted and disjoint; `None` if all pages are to be looked at.
    pub(crate) dirty: Option<Vec<Range<u64>>>,
}

impl ImageFile {
    pub(crate) fn open(source: &ImageSource, allow_changing: bool) -> Result<Self> {
        let path = &source.path;
        let watched = Watched::open(path, allow_changing)?;
        let bytes = watched.bytes;
        let pages = PageCount::covering(bytes).0;
        if pages > IMAGE_PAGES_MAX {
            return Err(StoreError::Usage(format!(
                "{} has {bytes} bytes, and no image may have more than 16 TiB; make it smaller, or leave it out",
                path.display()
            )));
        }
        let dirty = match &source.dirty {
            None => None,
            Some(Dirty::Ranges(ranges)) => Some(normalise(ranges, pages, path)?),
            Some(Dirty::Bitmap(bits)) => Some(ranges_of(bits, pages, path)?),
            Some(Dirty::FileData) => Some(data_pages(&watched.file, bytes, path)?),
        };
        Ok(ImageFile { watched, bytes, dirty })
    }

    /// Pages of the image.
    pub(crate) fn pages(&self) -> u64 {
        PageCount::covering(self.bytes).0
    }

    /// Bytes that will be looked at.
    pub(crate) fn work_bytes(&self) -> u64 {
        match &self.dirty {
            None => self.bytes,
            Some(ranges) => ranges.iter().map(|r| (r.end - r.start) * PAGE_BYTES as u64).sum(),
        }
    }

    /// After all was read: whether the file is still what it was.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.watched.check()
    }

    /// Where there may be anything but zeros again, from byte `offset` on.
    fn next_data(&self, offset: u64) -> Result<u64> {
        match rustix::fs::seek(&self.watched.file, SeekFrom::Data(offset)) {
            Ok(next) => Ok(next),
            Err(rustix::io::Errno::NXIO) => {
                // A hole up to the end, unless the end is not where it was.
                let now = self.watched.file.metadata();
                let now = now.map_err(|e| StoreError::file("reading", &self.watched.path, e))?;
                if now.is_file() && now.len() < self.bytes {
                    self.watched.ended_at(now.len())?;
                }
                Ok(u64::MAX)
            }
            // Not every file system or device knows its holes.
            Err(_) => Ok(offset),
        }
    }

    /// Fills `out`, which is zero, from byte `offset`; what is past the end stays zero.
    fn read(&self, mut offset: u64, out: &mut [u8]) -> Result<()> {
        let end = (offset + out.len() as u64).min(self.bytes);
        let mut wanted = &mut out[..(end - offset) as usize];
        while !wanted.is_empty() {
            match self.watched.file.read_at(wanted, offset) {
                Ok(0) => return self.watched.ended_at(offset),
                Ok(read) => {
                    wanted = &mut wanted[read..];
                    offset += read as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(StoreError::file("reading", &self.watched.path, e)),
            }
        }
        Ok(())
    }

    /// The first page from `page` on that is to be looked at, where the sections in `was_zero` were zero before.
    fn next_page(&self, mut page: u64, was_zero: &[bool]) -> Result<u64> {
        let data = self.next_data(page * PAGE_BYTES as u64)? / PAGE_BYTES as u64;
        while page < data && was_zero.get((page / SECTION_PAGES) as usize).is_some_and(|zero| *zero) {
            page = data.min((page / SECTION_PAGES + 1) * SECTION_PAGES);
        }
        Ok(page)
    }
}

/// A block to be read.
#[derive(Clone, Debug)]
struct BlockPlan {
    sequence: u64,
    image: usize,
    pages: Range<u64>,
    dirty: Option<Vec<Range<u64>>>,
}

/// Hands blocks out in order.
#[derive(Debug)]
pub(crate) struct BlockQueue<'a> {
    images: &'a [ImageFile],
    /// Of each image, which sections were zero before.
    was_zero: Vec<Vec<bool>>,
    next: Mutex<(u64, usize, u64)>,
    permits: Receiver<()>,
}

impl<'a> BlockQueue<'a> {
    /// Each block takes a permit, so that no more are waiting for an earlier one than there are permits.
    pub(crate) fn new(images: &'a [ImageFile], was_zero: Vec<Vec<bool>>, permits: Receiver<()>) -> Self {
        BlockQueue { images, was_zero, next: Mutex::new((0, 0, 0)), permits }
    }

    fn take(&self) -> Result<Option<BlockPlan>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, image, page) = &mut *next;
        loop {
            let Some(file) = self.images.get(*image) else { return Ok(None) };
            let start = match &file.dirty {
                None if *page >= file.pages() => *page,
                None => file.next_page(*page, &self.was_zero[*image])? / BLOCK_PAGES * BLOCK_PAGES,
                // Skip to the block with the next dirty page, so that clean blocks cost nothing.
                Some(ranges) => {
                    let i = ranges.partition_point(|r| r.end <= *page);
                    ranges.get(i).map_or(u64::MAX, |r| r.start.max(*page) / BLOCK_PAGES * BLOCK_PAGES)
                }
            };
            if start >= file.pages() {
                (*image, *page) = (*image + 1, 0);
                continue;
            }
            let pages = start..(start + BLOCK_PAGES).min(file.pages());
            let dirty = file.dirty.as_ref().map(|ranges| {
                let first = ranges.partition_point(|r| r.end <= pages.start);
                let inside = ranges[first..].iter().take_while(|r| r.start < pages.end);
                inside.map(|r| r.start.max(pages.start)..r.end.min(pages.end)).collect()
            });
            let plan = BlockPlan { sequence: *sequence, image: *image, pages: pages.clone(), dirty };
            *sequence += 1;
            *page = pages.end;
            return Ok(Some(plan));
        }
    }

    /// Reads and hashes the next block; `None` when there are no more, or nobody takes them.
    pub(crate) fn next_block(&self, domain: &Domain) -> Option<Result<Block>> {
        self.permits.recv().ok()?;
        self.take().and_then(|plan| plan.map(|plan| self.read(&plan, domain)).transpose()).transpose()
    }

    fn read(&self, plan: &BlockPlan, domain: &Domain) -> Result<Block> {
        let file = &self.images[plan.image];
        let pages = (plan.pages.end - plan.pages.start) as usize;
        let mut block = Block {
            sequence: plan.sequence,
            image: plan.image,
            first_page: plan.pages.start,
            pages: vec![PageHash::Clean; pages],
            data: Vec::new(),
            read_bytes: 0,
        };
        let whole = [plan.pages.clone()];
        for range in plan.dirty.as_deref().unwrap_or(&whole) {
            let (first, last) =
                ((range.start - plan.pages.start) as usize, (range.end - plan.pages.start) as usize);
            let offset = range.start * PAGE_BYTES as u64;
            if file.next_data(offset)? >= (range.end * PAGE_BYTES as u64).min(file.bytes) {
                block.pages[first..last].fill(PageHash::Zero);
                continue;
            }
            if block.data.is_empty() {
                block.data = vec![0; pages * PAGE_BYTES];
            }
            let bytes = &mut block.data[first * PAGE_BYTES..last * PAGE_BYTES];
            file.read(offset, bytes)?;
            block.read_bytes += bytes.len() as u64;
            for (page, hash) in bytes.chunks_exact(PAGE_BYTES).zip(&mut block.pages[first..last]) {
                *hash = if is_zero(page) { PageHash::Zero } else { PageHash::Chunk(domain.chunk_id(page)) };
            }
        }
        Ok(block)
    }
}

/// What a page of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageHash {
    /// Not dirty: as in the parent.
    Clean,
    /// All zero.
    Zero,
    /// Content with this id.
    Chunk(ChunkId),
}

/// A block read and hashed.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) sequence: u64,
    pub(crate) image: usize,
    pub(crate) first_page: u64,
    pub(crate) pages: Vec<PageHash>,
    data: Vec<u8>,
    pub(crate) read_bytes: u64,
}

impl Block {
    /// The bytes of page `i` of the block.
    pub(crate) fn page(&self, i: usize) -> &[u8] {
        &self.data[i * PAGE_BYTES..(i + 1) * PAGE_BYTES]
    }
}
