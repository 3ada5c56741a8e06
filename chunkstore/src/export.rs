//! Export: images become files again, byte for byte, with holes where pages are zero.

use std::{fs::File, os::unix::fs::FileExt, path::Path, sync::Mutex, sync::PoisonError, thread};

use dormouse_core::{PAGE_BYTES, PageIndex};

use crate::{
    error::{Result, StoreError},
    progress::Progress,
    snapshot::{Image, Pages},
};

/// Stored pages in a row are fetched by several threads, in steps of this many pages.
const STEP_PAGES: u64 = 1024;

impl Image {
    /// Writes the image to a new file beside `path` and renames it there when it is whole: a failed export leaves
    /// what was at `path` as it was.
    pub fn export(&self, path: &Path, progress: &dyn Progress) -> Result<()> {
        let error = |e| StoreError::file("writing", path, e);
        // Into devices and pipes one can only write directly.
        let in_place = std::fs::metadata(path).is_ok_and(|m| !m.is_file());
        if in_place {
            let file = File::options().write(true).open(path).map_err(error)?;
            return self.write_to(&file, path, true, progress);
        }
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary =
            tempfile::Builder::new().prefix(".dormouse-export").tempfile_in(dir).map_err(error)?;
        temporary.as_file().set_len(self.entry().bytes).map_err(error)?;
        self.write_to(temporary.as_file(), path, false, progress)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        temporary.as_file().set_permissions(mode).map_err(error)?;
        temporary.persist(path).map_err(|e| error(e.error))?;
        Ok(())
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
        let mut page = start;
        while page < end {
            page += match self.locate(PageIndex(page))? {
                Pages::Zero { pages } => {
                    let pages = pages.min(end - page);
                    if write_zeros {
                        write(page, &vec![0; pages as usize * PAGE_BYTES])?;
                    }
                    pages
                }
                Pages::Stored { at, slot, pages } => {
                    let pages = pages.min(end - page);
                    let frame = self.frame(&at)?;
                    let bytes = frame.pages(slot, pages as usize).ok_or(PAST_END)?;
                    write(page, bytes)?;
                    pages
                }
            };
        }
        Ok(())
    }
}

/// Decoding a section checks every place, so no stored data can bring this about.
const PAST_END: StoreError = StoreError::Bug("a page map refers past the end of a frame");
