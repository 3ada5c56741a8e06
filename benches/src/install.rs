//! Working sets installed from memory and from local disk.

use dormouse_restore::Policy;
use dormouse_wake::decode_workers;

use crate::Result;
use crate::guest::{Bench, GUEST_PAGES};
use crate::machine::{Machine, memory_for, open, runs_of, with_stream};
use crate::raw::{PlainFrames, copy_all};
use crate::row::Row;
use crate::stats::{median, ms, timed};

/// The level of zstd that the floor decodes: of those that shrink guest memory by no less than streams do, the fastest.
const PLAIN_LEVEL: i32 = -1;

/// `install_hot_*`: from memory, against raw copies of the same pages.
pub fn hot(bench: &Bench, mib: u64) -> Result<Vec<Row>> {
    let opened = with_stream(bench, mib)?;
    let runs = runs_of(&opened)?;
    opened.decode_ahead(true)?;
    let row = format!("install_hot_{mib}mib");
    let [ours, floor] = bench.compare(
        &row,
        "ms",
        bench.times(),
        [
            ("dormouse", &mut || {
                let (_mapping, memory) = memory_for(&opened)?;
                let machine = Machine::wake(&opened, memory, Policy::default())?;
                machine.wait_decoded();
                let (took, ()) = timed(|| machine.fill())?;
                machine.end()?;
                Ok(ms(took))
            }),
            ("raw copies", &mut || Ok(ms(copy_all(&runs, GUEST_PAGES)?))),
        ],
    )?;
    Ok(vec![Row::at_most(&row, "ms", median(ours), median(floor), 1.15)])
}

/// `install_warm_64mib`: opened and read from local disk, decoded and installed, against the slower of plain zstd on
/// as many cores and raw copies.
pub fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let runs = runs_of(&with_stream(bench, 64)?)?;
    let all: Vec<u8> = runs.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
    // The same pages as the stream's, in frames of the same size.
    let plain = PlainFrames::of(all.chunks(256 << 10), PLAIN_LEVEL)?;
    let [ours, zstd, copies] = bench.compare(
        "install_warm_64mib",
        "ms",
        bench.times(),
        [
            ("dormouse", &mut || {
                let store = bench.local_cold()?;
                let (_mapping, memory) = crate::guest::fresh(GUEST_PAGES, true)?;
                let (took, machine) = timed(|| {
                    let opened = open(&store, "guest")?;
                    opened.decode_ahead(false)?;
                    let machine = Machine::wake(&opened, memory, Policy::default())?;
                    machine.fill()?;
                    Ok(machine)
                })?;
                machine.end()?;
                Ok(ms(took))
            }),
            ("plain zstd", &mut || Ok(ms(plain.decode_all(decode_workers())))),
            ("raw copies", &mut || Ok(ms(copy_all(&runs, GUEST_PAGES)?))),
        ],
    )?;
    let floor = median(zstd).max(median(copies));
    Ok(vec![Row::at_most("install_warm_64mib", "ms", median(ours), floor, 1.2)])
}
