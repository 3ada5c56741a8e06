//! Counts what generations of machines on several hosts ask of a store and take in it; prints the table of
//! `docs/SCALE.md`.
//!
//! `cargo run --release -p dormouse-chunkstore --example scale -- [MACHINES] [GENERATIONS] [MIB] [DIRTY_PAGES]`

use std::{error::Error, fs::File, os::unix::fs::FileExt, path::Path, sync::Arc};

use dormouse_chunkstore::{
    Dirty, ImageSource, ImportRequest, NoProgress, Store, StoreOptions,
    backend::{
        Backend,
        faulty::{Counted, FaultyBackend},
        open_url,
    },
};
use dormouse_core::{ImageId, ImageKind, Name};

type Done<T> = Result<T, Box<dyn Error>>;

/// Pages of a template that all machines begin with; the rest is zero.
const TEMPLATE_SHARE: u64 = 2;

struct Host {
    store: Store,
    counting: Arc<FaultyBackend>,
    _cache: tempfile::TempDir,
}

fn host(backend: &Arc<dyn Backend>) -> Done<Host> {
    let counting = Arc::new(FaultyBackend::counting(backend.clone()));
    let cache = tempfile::tempdir()?;
    let options = StoreOptions { cache_dir: Some(cache.path().to_owned()), ..Default::default() };
    Ok(Host { store: Store::with_backend(counting.clone(), options), counting, _cache: cache })
}

/// A page of which half compresses.
fn page(seed: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page[..2048]);
    page
}

fn request(name: &str, parent: Option<&str>, path: &Path) -> Done<ImportRequest> {
    let mut request = ImportRequest::new(Name::new(name)?);
    request.parent = parent.map(Name::new).transpose()?;
    let id = ImageId::new("memory")?;
    request.images = vec![ImageSource { id, kind: ImageKind::Memory, path: path.to_owned(), dirty: None }];
    Ok(request)
}

fn row(what: &str, c: Counted, stored_bytes: u64, new_bytes: u64) {
    println!(
        "| {what} | {} | {} | {} | {} | {} | {} | {} | {} |",
        c.gets,
        c.get_bytes,
        c.heads,
        c.lists,
        c.puts,
        c.swaps + c.deletes,
        stored_bytes,
        new_bytes
    );
}

fn main() -> Done<()> {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (machines, generations, mib, dirty) = (next(4)?, next(100)?, next(256)?, next(512)?);
    let pages = mib * 256;
    let backend = open_url("memory://")?;
    let dir = tempfile::tempdir()?;
    println!(
        "{machines} machines of {mib} MiB, half of it zero, {generations} generations of {dirty} dirty pages\n"
    );
    println!(
        "| what | GET | bytes read | HEAD | LIST | PUT | swap + delete | bytes stored | of it new pages, raw |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for machine in 0..machines {
        // Every machine on a host of its own, whose cache is empty.
        let host = host(&backend)?;
        let path = dir.path().join("memory");
        let file = File::create(&path)?;
        file.set_len(pages * 4096)?;
        for p in 0..pages / TEMPLATE_SHARE {
            file.write_all_at(&page(p), p * 4096)?;
        }
        let name = |generation: u64| format!("m{machine:04}-g{generation:04}");
        let report = host.store.import(&request(&name(0), None, &path)?, &NoProgress)?;
        let asked = host.counting.counts().take();
        row(&format!("machine {machine}, first import"), asked, report.stored_bytes, report.new_bytes);
        let (mut gets, mut bytes, mut stored, mut gathered) = (0, 0, 0, 0);
        for generation in 1..=generations {
            // Dirty pages in runs of eight, elsewhere each time.
            let runs: Vec<_> = (0..dirty / 8)
                .map(|run| {
                    let at = (run * 2_654_435_761 + generation * 40_503) % (pages / 8) * 8;
                    at..at + 8
                })
                .collect();
            for p in runs.iter().cloned().flatten() {
                file.write_all_at(&page((machine + 1) << 48 | generation << 32 | p), p * 4096)?;
            }
            let mut request = request(&name(generation), Some(&name(generation - 1)), &path)?;
            request.images[0].dirty = Some(Dirty::Ranges(runs));
            host.counting.counts().take();
            let report = host.store.import(&request, &NoProgress)?;
            let asked = host.counting.counts().take();
            gets += asked.gets;
            bytes += asked.get_bytes;
            stored += report.stored_bytes;
            gathered += report.gathered_bytes;
            if machine == 0 && (generation <= 2 || generation == generations / 2 || generation == generations)
            {
                row(&format!("child, generation {generation}"), asked, report.stored_bytes, report.new_bytes);
            }
            if machine == 0 && (generation == 2 || generation == generations) {
                let other = self::host(&backend)?;
                other.store.open_snapshot(&Name::new(name(generation))?)?;
                row(&format!("open, generation {generation}"), other.counting.counts().take(), 0, 0);
            }
        }
        if machine == 0 {
            println!(
                "| child, mean of all | {:.1} | {} | | | | | {} | {}, and {} stored again |",
                gets as f64 / generations as f64,
                bytes / generations,
                stored / generations,
                dirty * 4096,
                gathered / generations
            );
        }
    }
    let host = host(&backend)?;
    let usage = host.store.usage()?;
    println!(
        "\nin all: {} snapshots, {} objects, {} bytes stored, {} bytes of machines, {} of it not zero",
        usage.snapshots.len(),
        usage.total.objects,
        usage.total.stored_bytes,
        usage.total.logical_bytes,
        usage.total.nonzero_bytes
    );
    if let Some(last) = usage.snapshots.iter().find(|s| s.name == format!("m0000-g{generations:04}")) {
        println!(
            "generation {generations} of machine 0: {:.1} packs and {:.1} reads per 64 MiB",
            last.scatter.packs_per_64_mib, last.scatter.reads_per_64_mib
        );
    }
    host.counting.counts().take();
    let gc = host.store.gc(Default::default())?;
    row("\ncollecting", host.counting.counts().take(), 0, 0);
    println!("\n{} of {} packs and roots live", gc.live_objects, gc.objects);
    Ok(())
}
