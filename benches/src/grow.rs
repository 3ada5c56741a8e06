//! What must not grow: with a machine's size, with its age, with the number of machines.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use dormouse_chunkstore::{Store, StoreOptions, TouchedRun, backend::open_url};
use dormouse_core::PAGE_BYTES;
use dormouse_restore::Policy;
use dormouse_wake::Opened;

use crate::guest::{Bench, GUEST_PAGES, import, name};
use crate::machine::{Machine, memory_for, open, runs_of, with_stream};
use crate::raw::copy_all;
use crate::row::Row;
use crate::stats::{median, ms, quantile};
use crate::{BenchError, Result};

/// Pages of the working sets: 16 MiB.
const PAGES: u64 = 4096;

/// A whole resume of `called`: opened by name, memory mapped and registered, working set in place.
fn resume(store: &Store, called: &str) -> Result<f64> {
    let begin = Instant::now();
    let opened = open(store, called)?;
    opened.decode_ahead(false)?;
    let (_mapping, memory) = memory_for(&opened)?;
    let machine = Machine::wake(&opened, memory, Policy::default())?;
    machine.fill()?;
    let took = ms(begin.elapsed());
    machine.end()?;
    Ok(took)
}

/// `grow_vm_size`: 64 GiB, nearly all of it never used, against 128 MiB.
pub fn vm_size(bench: &Bench) -> Result<Vec<Row>> {
    let store = Store::open(&bench.dir().join("sizes").to_string_lossy(), StoreOptions::default())?;
    let touched = [TouchedRun { image: 0, pages: 0..PAGES }];
    for (called, bytes) in [("small", 128u64 << 20), ("large", 64 << 30)] {
        let path = bench.dir().join(called);
        let failed = |e| BenchError::file(format!("writing {}", path.display()))(e);
        let file = File::create(&path).map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        file.write_all_at(&bench.bytes()[..PAGES as usize * PAGE_BYTES], 0).map_err(failed)?;
        import(&store, called, &path, None)?;
        store.build_stream(&store.open_snapshot(&name(called)?)?, &touched)?;
    }
    let [large, small] = bench.compare(
        "grow_vm_size",
        "ms",
        bench.times(),
        [("64 GiB", &mut || resume(&store, "large")), ("128 MiB", &mut || resume(&store, "small"))],
    )?;
    Ok(vec![Row::at_most("grow_vm_size", "ms", median(large), median(small), 1.2)])
}

/// `grow_generations`: a machine put to sleep a thousand times, against the same after the first time.
pub fn generations(bench: &Bench) -> Result<Vec<Row>> {
    let last = if bench.quick { 100 } else { 1000 };
    let store = Store::with_backend(open_url("memory://")?, StoreOptions::default());
    let path = bench.dir().join("aging");
    let failed = |e| BenchError::file(format!("writing {}", path.display()))(e);
    let file = File::create(&path).map_err(failed)?;
    file.write_all_at(&bench.bytes()[..PAGES as usize * PAGE_BYTES], 0).map_err(failed)?;
    let called = |generation: u64| format!("generation-{generation:04}");
    import(&store, &called(1), &path, None)?;
    for generation in 2..=last {
        let dirty: Vec<u64> = (0..8).map(|i| (generation * 37 + i * 509) % PAGES).collect();
        let mut sorted = dirty.clone();
        sorted.sort_unstable();
        sorted.dedup();
        for page in &sorted {
            file.write_all_at(&generation.to_le_bytes(), page * PAGE_BYTES as u64 + 64).map_err(failed)?;
        }
        import(&store, &called(generation), &path, Some((&called(generation - 1), sorted)))?;
    }
    let touched = [TouchedRun { image: 0, pages: 0..PAGES }];
    for generation in [1, last] {
        store.build_stream(&store.open_snapshot(&name(&called(generation))?)?, &touched)?;
    }
    let [late, first] = bench.compare(
        "grow_generations",
        "ms",
        bench.times(),
        [("last", &mut || resume(&store, &called(last))), ("first", &mut || resume(&store, &called(1)))],
    )?;
    Ok(vec![Row::at_most("grow_generations", "ms", median(late), median(first), 1.1)])
}

/// `many_100`: p99 of a hundred machines that wake at the same moment, against their bytes at raw copy speed.
pub fn many(bench: &Bench) -> Result<Vec<Row>> {
    let (machines, mib) = (100, if bench.quick { 4 } else { 16 });
    let opened = with_stream(bench, mib)?;
    let runs = runs_of(&opened)?;
    opened.decode_ahead(true)?;
    let [ours, floor] = bench.compare(
        "many_100",
        "ms",
        3,
        [
            ("p99 of a hundred", &mut || at_once(machines, &opened)),
            ("raw copies", &mut || {
                (0..machines).try_fold(0.0, |sum, _| Ok(sum + ms(copy_all(&runs, GUEST_PAGES)?)))
            }),
        ],
    )?;
    Ok(vec![Row::at_most("many_100", "ms", median(ours), median(floor), 2.0)])
}

fn at_once(machines: usize, opened: &Opened) -> Result<f64> {
    let barrier = Barrier::new(machines);
    let policy = Policy { demand_workers: 1, prefetch_workers: 0, ..Policy::default() };
    let one = || {
        barrier.wait();
        let begin = Instant::now();
        let (_mapping, memory) = memory_for(opened)?;
        let machine = Machine::wake(opened, memory, policy.clone())?;
        machine.wait_decoded();
        machine.fill()?;
        let took = ms(begin.elapsed());
        machine.end()?;
        Ok::<f64, BenchError>(took)
    };
    let times: Result<Vec<f64>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..machines).map(|_| scope.spawn(one)).collect();
        let panicked = || BenchError::wrong("a machine's thread panicked");
        threads.into_iter().map(|t| t.join().map_err(|_| panicked())?).collect()
    });
    Ok(quantile(times?, 0.99))
}
