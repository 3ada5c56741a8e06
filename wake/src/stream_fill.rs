//! Installing a resume stream as it arrives, beside the faults.

use std::{
    sync::Arc,
    thread::{Builder, JoinHandle},
};

use dormouse_chunkstore::{HotStream, Result as StoreResult, ResumeStream, StoreError};
use dormouse_core::PAGE_BYTES;

use dormouse_restore::{BulkInstaller, RestoreError, RestoreHandle};

/// What a stream brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamFilled {
    /// Pages that it put in place.
    pub installed_pages: u64,
    /// Why it ended before its end. The machine goes on without it: what it did not bring is fetched by faults.
    pub ended_early: Option<String>,
}

/// A stream being installed on a thread of its own.
#[derive(Debug)]
pub struct StreamFill {
    thread: JoinHandle<StreamFilled>,
}

impl StreamFill {
    /// Begins to install the pages of `image` (an index into the root's images) that `stream` brings, decoding on
    /// `workers` threads.
    pub fn start(
        handle: &RestoreHandle,
        stream: Arc<ResumeStream>,
        image: u32,
        workers: usize,
    ) -> Result<Self, RestoreError> {
        let installer = handle.installer();
        let run = move || fill_from_stream(&installer, &stream, image, workers);
        let thread = Builder::new().name("dm-stream-fill".into()).spawn(run).map_err(RestoreError::Start)?;
        Ok(StreamFill { thread })
    }

    /// Waits until all of it is installed.
    pub fn join(self) -> StreamFilled {
        self.thread.join().unwrap_or_else(|_| StreamFilled {
            ended_early: Some("the thread that installed the stream panicked".into()),
            ..Default::default()
        })
    }
}

/// Installs what `stream` brings of `image`, on `workers` threads; returns when all is in place.
pub fn fill_from_stream(
    installer: &BulkInstaller,
    stream: &ResumeStream,
    image: u32,
    workers: usize,
) -> StreamFilled {
    let installed = std::sync::atomic::AtomicU64::new(0);
    let done = stream.for_each_run(workers, &|of, first, bytes| {
        if of == image {
            let pages = install(installer, first, bytes)?;
            installed.fetch_add(pages, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    });
    let ended_early = done.err().map(|why| why.to_string());
    if let Some(why) = &ended_early {
        tracing::warn!(%why, "the resume stream ended early; what it did not bring is fetched by faults");
    }
    StreamFilled { installed_pages: installed.into_inner(), ended_early }
}

/// Installs a stream that is decoded in memory already: the hot tier. Returns the pages it put in place.
pub fn fill_from_memory(installer: &BulkInstaller, hot: &HotStream, image: u32) -> Result<u64, RestoreError> {
    let mut pages = 0;
    for run in hot.runs.iter().filter(|r| r.image == image) {
        debug_assert!(run.bytes.len().is_multiple_of(PAGE_BYTES));
        pages += installer.install_run(run.first, &run.bytes)?;
    }
    Ok(pages)
}

/// The stream only wants to know whether to go on.
fn install(installer: &BulkInstaller, first: dormouse_core::PageIndex, bytes: &[u8]) -> StoreResult<u64> {
    installer.install_run(first, bytes).map_err(|why| StoreError::Usage(why.to_string()))
}
