//! The pages that a machine touched first, as a blob of its snapshot.
//!
//! A hint only: pages it leaves out fault, pages it names in vain cost time, and damage to it is reported but
//! does no harm. The layout, all integers little-endian:
//!
//! ```text
//! offset  bytes  field
//!      0      8  magic "DORMWSET"
//!      8      4  version, 1
//!     12      4  number of runs
//!     16     12  each: first image page u64, pages u32
//! ```

use dormouse_chunkstore::{Snapshot, StoreError, StreamReport, TouchedRun};
use dormouse_core::PageIndex;
use dormouse_restore::PageRun;

/// What the blob is called.
pub const WORKING_SET_ID: &str = "dormouse-working-set";
const MAGIC: &[u8; 8] = b"DORMWSET";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const RUN_BYTES: usize = 12;
/// Most runs read or written: 16 GiB of frames.
const RUNS_MAX: usize = 1 << 17;

/// Why a stored working set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// It cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is not one.
    #[error("the stored working set is {0}; the machine wakes without it, only slower")]
    Content(&'static str),
}

/// Its bytes; runs beyond the most that are written are left out.
pub fn encode_working_set(runs: &[PageRun]) -> Vec<u8> {
    let runs = &runs[..runs.len().min(RUNS_MAX)];
    let mut out = Vec::with_capacity(HEADER_BYTES + runs.len() * RUN_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.first.0.to_le_bytes());
        out.extend_from_slice(&u32::try_from(run.pages).unwrap_or(u32::MAX).to_le_bytes());
    }
    out
}

/// The runs in a working set's bytes. Pure; never panics, allocates no more than `bytes` holds.
///
/// # Errors
/// [`WorkingSetError::Content`].
pub fn decode_working_set(bytes: &[u8]) -> Result<Vec<PageRun>, WorkingSetError> {
    decode(bytes).map_err(WorkingSetError::Content)
}

fn decode(bytes: &[u8]) -> Result<Vec<PageRun>, &'static str> {
    let (header, runs) = bytes.split_at_checked(HEADER_BYTES).ok_or("cut short")?;
    let word = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if !header.starts_with(MAGIC) {
        return Err("something else");
    }
    if word(8) != Some(VERSION) {
        return Err("of another version");
    }
    let count = word(12).unwrap_or(0) as usize;
    if count > RUNS_MAX || runs.len() != count * RUN_BYTES {
        return Err("not as long as it says");
    }
    let run = |bytes: &[u8]| {
        let (first, pages) = bytes.split_at_checked(8)?;
        Some(PageRun {
            first: PageIndex(u64::from_le_bytes(first.try_into().ok()?)),
            pages: u32::from_le_bytes(pages.try_into().ok()?).into(),
        })
    };
    runs.chunks_exact(RUN_BYTES).map(run).collect::<Option<_>>().ok_or("cut short")
}

/// The working set stored with `snapshot`; `None` if it has none.
///
/// # Errors
/// [`WorkingSetError`]: the snapshot can be woken all the same.
pub fn stored_working_set(snapshot: &Snapshot) -> Result<Option<Vec<PageRun>>, WorkingSetError> {
    if !snapshot.root().blobs.iter().any(|b| b.id.as_str() == WORKING_SET_ID) {
        return Ok(None);
    }
    decode_working_set(&snapshot.read_blob(WORKING_SET_ID)?).map(Some)
}

/// Makes the resume stream of a stored machine, from what it is known to touch first: the next
/// wake reads that as one object. It can be made again at any time, and done without.
///
/// # Errors
/// The store's.
pub fn build_stream(snapshot: &Snapshot, runs: &[PageRun]) -> Result<StreamReport, StoreError> {
    let image = crate::memory_index(snapshot).unwrap_or(0);
    let touched =
        |run: &PageRun| TouchedRun { image, pages: run.first.0..run.first.0.saturating_add(run.pages) };
    snapshot.store().build_stream(snapshot, &runs.iter().map(touched).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_is() {
        let runs = [run(7, 32), run(0, 1), run(1 << 40, 5)];
        let bytes = encode_working_set(&runs);
        assert_eq!(decode(&bytes), Ok(runs.to_vec()));
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "cut to {cut}");
        }
        for at in 0..HEADER_BYTES {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(decode(&damaged).is_err(), "byte {at}");
        }
    }
}
