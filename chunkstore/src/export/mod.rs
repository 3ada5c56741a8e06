//! Export: images become files again, byte for byte, with holes where pages are zero.

mod staged;
mod stream;
mod target;

use std::{fs::File, os::unix::fs::FileExt, path::Path, sync::Mutex, sync::PoisonError, thread};

use dormouse_core::{PAGE_BYTES, PageIndex};

pub use self::target::ExportTarget;
use crate::{
    error::{Result, StoreError},
    progress::Progress,
    snapshot::{Image, Pages},
};

/// Stored pages in a row are fetched by several threads, in steps of this many pages.
const STEP_PAGES: u64 = 1024;

impl Image {
    /// Writes the image to `path`. A file is there as a whole or stays as it was; see [`ExportTarget`].
    pub fn export(&self, path: &Path, progress: &dyn Progress) -> Result<()> {
        let mut target = ExportTarget::open(path, self.entry().bytes)?;
        self.export_to(&mut target, progress)?;
        target.finish()
    }

    /// Writes the image into `target`, which [`ExportTarget::finish`] then makes whole.
    pub fn export_to(&self, target: &mut ExportTarget, progress: &dyn Progress) -> Result<()> {
        let path = target.path().to_owned();
        match target.begin(self.entry().bytes)? {
            target::Way::Sparse(file) => self.write_to(file, &path, false, progress),
            target::Way::Over(file) => self.write_to(file, &path, true, progress),
            target::Way::InOrder(file) => self.write_in_order(file, &path, progress),
        }
    }

    /// Writes the image into `file`, which is empty, such as a file in memory. Holes stay where pages are zero.
    pub fn export_into(&self, file: &File, progress: &dyn Progress) -> Result<()> {
        self.write_to(file, Path::new("a file in memory"), false, progress)
    }

    fn write_to(&self, file: &File, path: &Path, write_zeros: bool, progress: &dyn Progress) -> Result<()> {
        progress.begin(self.entry().bytes);
        let next = Mutex::new(0u64);
        let failed = Mutex::new(None);
        let workers = thread::available_parallelism().map_or(2, std::num::NonZero::get).max(4);
        let lock = |m: &Mutex<Option<StoreError>>, e| {
            m.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
        };
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let start = {
                            let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                            let start = *next;
                            *next += STEP_PAGES;
                            start
                        };
                        let stop = failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
                        if start >= self.pages().0 || stop {
                            return;
                        }
                        let end = (start + STEP_PAGES).min(self.pages().0);
                        if let Err(e) = self.write_range(file, path, start, end, write_zeros) {
                            return lock(&failed, e);
                        }
                        progress.advance((end - start) * PAGE_BYTES as u64);
                    }
                });
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn write_range(&self, file: &File, path: &Path, start: u64, end: u64, write_zeros: bool) -> Result<()> {
        let write = |page: u64, bytes: &[u8]| {
            let offset = PageIndex(page).byte_offset();
            // The last page may reach past the image's exact size.
            let fits = self.entry().bytes.saturating_sub(offset).min(bytes.len() as u64) as usize;
            file.write_all_at(&bytes[..fits], offset).map_err(|e| StoreError::file("writing", path, e))
        };
        self.runs(start, end, &mut |page, run| match run {
            Run::Zeros(pages) if write_zeros => write(page, &vec![0; pages as usize * PAGE_BYTES]),
            Run::Zeros(_) => Ok(()),
            Run::Bytes(bytes) => write(page, bytes),
        })
    }

    /// Hands out what the pages from `start` to `end` hold, in order, each with its first page.
    fn runs(&self, start: u64, end: u64, each: &mut dyn FnMut(u64, Run<'_>) -> Result<()>) -> Result<()> {
        let mut page = start;
        while page < end {
            page += match self.locate(PageIndex(page))? {
                Pages::Zero { pages } => {
                    let pages = pages.min(end - page);
                    each(page, Run::Zeros(pages))?;
                    pages
                }
                Pages::Stored { at, slot, pages } => {
                    let pages = pages.min(end - page);
                    let frame = self.frame(&at)?;
                    each(page, Run::Bytes(frame.pages(slot, pages as usize).ok_or(PAST_END)?))?;
                    pages
                }
            };
        }
        Ok(())
    }
}

/// Pages in a row.
enum Run<'a> {
    /// So many zero pages.
    Zeros(u64),
    Bytes(&'a [u8]),
}

/// Decoding a section checks every place, so no stored data can bring this about.
const PAST_END: StoreError = StoreError::Bug("a page map refers past the end of a frame");
