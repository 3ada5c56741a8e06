//! An image as a stream of bytes, for what cannot be written at any place: pipes and terminals.
//!
//! Several threads fetch ahead, by so many steps at most as [`AHEAD`] says: memory does not grow with the image.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use crossbeam::channel::bounded;
use dormouse_core::{PAGE_BYTES, PageIndex};

use super::{Run, STEP_PAGES};
use crate::{
    error::{Result, StoreError},
    import::permits,
    progress::Progress,
    snapshot::Image,
};

/// Steps of 4 MiB that may wait for an earlier one.
const AHEAD: usize = 8;

impl Image {
    /// Writes all bytes one after the other, zeros too.
    pub(super) fn write_in_order(&self, mut file: &File, path: &Path, progress: &dyn Progress) -> Result<()> {
        progress.begin(self.entry().bytes);
        let steps = self.pages().0.div_ceil(STEP_PAGES);
        let (next, workers) = (AtomicU64::new(0), thread::available_parallelism().map_or(2, |n| n.get()));
        let (give, taken) = permits(AHEAD);
        thread::scope(|scope| {
            // When this closure ends, however it does, whoever waits for a permit or sends is told.
            let give = give;
            let (out, read) = bounded(AHEAD);
            for _ in 0..workers.clamp(2, AHEAD) {
                let (out, taken, next) = (out.clone(), taken.clone(), &next);
                scope.spawn(move || {
                    while taken.recv().is_ok() {
                        let step = next.fetch_add(1, Ordering::Relaxed);
                        if step >= steps || out.send((step, self.read_step(step))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(out);
            let (mut early, mut at) = (BTreeMap::new(), 0);
            while at < steps {
                let (step, bytes) =
                    read.recv().map_err(|_| StoreError::Bug("the export stopped without a reason"))?;
                early.insert(step, bytes?);
                while let Some(bytes) = early.remove(&at) {
                    file.write_all(&bytes).map_err(|e| StoreError::file("writing", path, e))?;
                    progress.advance(bytes.len() as u64);
                    at += 1;
                    // There are as many permits as there is room for.
                    let _ = give.try_send(());
                }
            }
            Ok(())
        })
    }

    /// The bytes of a step, to the image's end at most.
    fn read_step(&self, step: u64) -> Result<Vec<u8>> {
        let (start, end) = (step * STEP_PAGES, ((step + 1) * STEP_PAGES).min(self.pages().0));
        let mut bytes = vec![0; (end - start) as usize * PAGE_BYTES];
        self.runs(start, end, &mut |page, run| {
            if let Run::Bytes(run) = run {
                bytes[(page - start) as usize * PAGE_BYTES..][..run.len()].copy_from_slice(run);
            }
            Ok(())
        })?;
        let left = self.entry().bytes.saturating_sub(PageIndex(start).byte_offset());
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(bytes)
    }
}
