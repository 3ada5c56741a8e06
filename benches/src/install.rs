//! Working sets installed from memory and from local disk.

use std::sync::Arc;

use dormouse_chunkstore::{HotStream, Resume};
use dormouse_core::{ImageKind, PAGE_BYTES};
use dormouse_restore::{Policy, VmStopped};
use dormouse_wake::{StoredImage, fill_from_memory, fill_from_stream};

use crate::guest::{Bench, GUEST_PAGES, MEMORY, name, start};
use crate::raw::{PlainFrames, copy_all};
use crate::row::Row;
use crate::stats::{median, ms, timed};
use crate::{BenchError, Result};

/// The level of zstd that the floor decodes: of those that shrink guest memory by no less than streams do, the fastest.
const PLAIN_LEVEL: i32 = -1;
/// Threads that decode, and cores that the floor is given.
const WORKERS: usize = 2;

/// The guest's stream with a working set of `mib`, opened.
pub(crate) fn resume_with(bench: &Bench, mib: u64) -> Result<Resume> {
    let store = bench.local()?;
    let guest = name("guest")?;
    store.build_stream(&store.open_snapshot(&guest)?, &bench.working_set(mib * 256, 1))?;
    Ok(store.open_resume(&guest)?)
}

pub(crate) fn image(resume: &Resume) -> Result<Arc<StoredImage>> {
    Ok(Arc::new(StoredImage::new(resume.snapshot.image(ImageKind::Memory, MEMORY)?)))
}

pub(crate) fn decoded(resume: &Resume) -> Result<HotStream> {
    let none = || BenchError::wrong("the stream just built is not there");
    Ok(resume.stream.as_ref().ok_or_else(none)?.decode_all(WORKERS)?)
}

/// `install_hot_*`: from memory, against raw copies of the same pages.
pub fn hot(bench: &Bench, mib: u64) -> Result<Vec<Row>> {
    let resume = resume_with(bench, mib)?;
    let hot = decoded(&resume)?;
    let image = image(&resume)?;
    let row = format!("install_hot_{mib}mib");
    let [ours, floor] = bench.compare(
        &row,
        "ms",
        bench.times(),
        [
            ("dormouse", &mut || {
                let (_mapping, handle) = start(image.clone(), Policy::default())?;
                let (took, pages) = timed(|| Ok(fill_from_memory(&handle.installer(), &hot, 0)?))?;
                let counts = handle.stop(VmStopped::attest());
                if pages != counts.pages_copied || pages * PAGE_BYTES as u64 != raw_bytes(&hot) {
                    return Err(BenchError::wrong("not all of the working set was installed"));
                }
                Ok(ms(took))
            }),
            ("raw copies", &mut || Ok(ms(copy_all(&hot, GUEST_PAGES)?))),
        ],
    )?;
    Ok(vec![Row::at_most(&row, "ms", median(ours), median(floor), 1.15)])
}

fn raw_bytes(hot: &HotStream) -> u64 {
    hot.runs.iter().map(|r| r.bytes.len() as u64).sum()
}

/// `install_warm_64mib`: opened and read from local disk, decoded and installed, against the slower of plain zstd on
/// as many cores and raw copies.
pub fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let resume = resume_with(bench, 64)?;
    let hot = decoded(&resume)?;
    let all: Vec<u8> = hot.runs.iter().flat_map(|r| r.bytes.iter().copied()).collect();
    // The same pages as the stream's, in frames of the same size.
    let plain = PlainFrames::of(all.chunks(256 << 10), PLAIN_LEVEL)?;
    let guest = name("guest")?;
    let [ours, zstd, copies] = bench.compare(
        "install_warm_64mib",
        "ms",
        bench.times(),
        [
            ("dormouse", &mut || {
                let store = bench.local_cold()?;
                let (_mapping, handle) = start(image(&resume)?, Policy::default())?;
                let (took, filled) = timed(|| {
                    let resume = store.open_resume(&guest)?;
                    let stream = resume.stream.as_ref().ok_or_else(|| BenchError::wrong("no stream"))?;
                    Ok(fill_from_stream(&handle.installer(), stream, 0, WORKERS))
                })?;
                handle.stop(VmStopped::attest());
                match filled.ended_early {
                    None => Ok(ms(took)),
                    Some(why) => Err(BenchError::wrong(why)),
                }
            }),
            ("plain zstd", &mut || Ok(ms(plain.decode_all(WORKERS)))),
            ("raw copies", &mut || Ok(ms(copy_all(&hot, GUEST_PAGES)?))),
        ],
    )?;
    let floor = median(zstd).max(median(copies));
    Ok(vec![Row::at_most("install_warm_64mib", "ms", median(ours), floor, 1.2)])
}
