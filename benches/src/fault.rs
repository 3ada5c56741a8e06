//! Pages on demand.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use dormouse_core::{ImageKind, PAGE_BYTES, PageIndex};
use dormouse_restore::{Content, Extent, Mapping, PageSource, Policy, VmStopped};
use dormouse_wake::StoredImage;

use crate::guest::{Bench, GUEST_PAGES, MEMORY, fresh, name, start};
use crate::raw::{PlainFrames, serving};
use crate::row::Row;
use crate::stats::{Rng, median, ms, us};
use crate::{BenchError, Result};

/// Faults of one turn.
const FAULTS: usize = 64;

fn stored(bench: &Bench, cold: bool) -> Result<Arc<StoredImage>> {
    let warm = bench.local()?;
    let store = if cold { bench.local_cold()? } else { warm };
    let image = store.open_snapshot(&name("guest")?)?.image(ImageKind::Memory, MEMORY)?;
    Ok(Arc::new(StoredImage::new(image)))
}

/// Runs of full frames all over the image, each of another frame, with the page in its middle.
fn picked(source: &StoredImage) -> Result<Vec<(u64, Extent)>> {
    let (mut all, mut page) = (Vec::new(), 0);
    let mut frames = std::collections::HashSet::new();
    while page < GUEST_PAGES {
        let extent = source.locate(PageIndex(page))?;
        if let Content::Frame { frame, .. } = extent.content
            && extent.pages >= 28
            && frames.insert(frame)
        {
            all.push((extent.first.0 + extent.pages / 2, extent));
        }
        page = extent.first.0 + extent.pages;
    }
    Rng(3).shuffle(&mut all);
    if all.len() < FAULTS {
        return Err(BenchError::wrong("the image has too few full frames to measure faults with"));
    }
    all.truncate(FAULTS * 2);
    Ok(all)
}

fn touch(mapping: &Mapping, page: u64) -> f64 {
    let start = Instant::now();
    std::hint::black_box(mapping.load(page as usize * PAGE_BYTES));
    us(start.elapsed())
}

/// p50 of faults on `pages`, served by a restore of `source`.
fn ours(source: Arc<StoredImage>, pages: &[(u64, Extent)]) -> Result<f64> {
    let (mapping, handle) = start(source, Policy::default())?;
    let samples = pages.iter().map(|(page, _)| touch(&mapping, *page)).collect();
    let counts = handle.stop(VmStopped::attest());
    if counts.faults < pages.len() as u64 {
        return Err(BenchError::wrong("pages to be measured were there without a fault"));
    }
    Ok(median(samples))
}

/// p50 of the same faults, served by a bare loop.
fn bare(bench: &Bench, pages: &[(u64, Extent)]) -> Result<f64> {
    let (mapping, memory) = fresh(GUEST_PAGES, false)?;
    let bytes = bench.bytes();
    let serve = |page: u64, into: &mut [u8; PAGE_BYTES]| {
        into.copy_from_slice(&bytes[page as usize * PAGE_BYTES..][..PAGE_BYTES]);
    };
    Ok(median(serving(&memory, serve, || pages.iter().map(|(page, _)| touch(&mapping, *page)).collect())))
}

/// `fault_hit`: a page of a frame that is decoded in memory.
pub fn hit(bench: &Bench) -> Result<Vec<Row>> {
    let source = stored(bench, false)?;
    let pages = picked(&source)?;
    for (_, extent) in &pages {
        if let Content::Frame { frame, .. } = extent.content {
            source.fetch(frame)?;
        }
    }
    let [ours, floor] = bench.compare(
        "fault_hit",
        "us",
        bench.times(),
        [("dormouse", &mut || ours(source.clone(), &pages)), ("bare loop", &mut || bare(bench, &pages))],
    )?;
    Ok(vec![Row::at_most("fault_hit", "us", median(ours), median(floor), 1.2)])
}

/// `fault_miss_local`: a page of a compressed frame on local disk.
pub fn miss_local(bench: &Bench) -> Result<Vec<Row>> {
    let pages = picked(&*stored(bench, true)?)?;
    let raw = |(_, e): &(u64, Extent)| {
        &bench.bytes()[e.first.0 as usize * PAGE_BYTES..][..e.pages as usize * PAGE_BYTES]
    };
    let plain = PlainFrames::of(pages.iter().map(raw), dormouse_chunkstore::DEFAULT_LEVEL)?;
    let [ours, floor, decode] = bench.compare(
        "fault_miss_local",
        "us",
        bench.times(),
        [
            ("dormouse", &mut || {
                let source = stored(bench, true)?;
                for (page, _) in &pages {
                    source.locate(PageIndex(*page))?;
                }
                ours(source, &pages)
            }),
            ("bare loop", &mut || bare(bench, &pages)),
            ("plain zstd", &mut || Ok(median(plain.decode_each().into_iter().map(us).collect()))),
        ],
    )?;
    Ok(vec![Row::at_most("fault_miss_local", "us", median(ours), median(floor) + median(decode), 1.3)])
}

/// `touch_all_random`: all of a guest's memory, one page after the other in random order, served as `serve-uffd` does
/// it: the rest is installed in the background, faults first. `touch_all_on_demand`: without that.
pub fn touch_all(bench: &Bench) -> Result<Vec<Row>> {
    bench.local()?;
    let mut order: Vec<u64> = (0..GUEST_PAGES).collect();
    Rng(5).shuffle(&mut order);
    let touch_all = |mapping: &Mapping| {
        let start = Instant::now();
        for page in &order {
            std::hint::black_box(mapping.load(*page as usize * PAGE_BYTES));
        }
        ms(start.elapsed())
    };
    let file = File::open(bench.file()).map_err(BenchError::file("opening the guest's memory"))?;
    let served = |fill: bool| {
        let (mapping, handle) = start(stored(bench, true)?, Policy::default())?;
        if fill {
            handle.fill_all();
        }
        let took = touch_all(&mapping);
        handle.stop(VmStopped::attest());
        Ok(took)
    };
    let [filled, on_demand, floor] = bench.compare(
        "touch_all_random",
        "ms",
        if bench.quick { 1 } else { 5 },
        [
            ("dormouse", &mut || served(true)),
            ("dormouse on demand", &mut || served(false)),
            ("page by page", &mut || {
                let (mapping, memory) = fresh(GUEST_PAGES, false)?;
                let serve = |page: u64, into: &mut [u8; PAGE_BYTES]| {
                    // A failed read would show as a wrong figure, not as wrong data: nobody keeps it.
                    let _ = file.read_exact_at(into, page * PAGE_BYTES as u64);
                };
                Ok(serving(&memory, serve, || touch_all(&mapping)))
            }),
        ],
    )?;
    let floor = median(floor);
    Ok(vec![
        Row::at_most("touch_all_random", "ms", median(filled), floor, 0.15),
        Row::reported("touch_all_on_demand", "ms", median(on_demand), floor),
    ])
}
