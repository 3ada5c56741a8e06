//! How much of what a clone needs was prefetched, and how much was prefetched in vain.

use std::collections::HashSet;

use dormouse_chunkstore::TouchedRun;
use dormouse_core::{PAGE_BYTES, PageIndex};
use dormouse_restore::Policy;
use dormouse_restore::state::PageState;

use crate::Result;
use crate::guest::{Bench, name};
use crate::machine::{Machine, memory_for, open};
use crate::row::Row;

/// Pages of the working set: 16 MiB.
const PAGES: u64 = 4096;

/// `coverage` and `overfetch`: one machine's trace makes the stream, another's, of which 7 % differ, is replayed.
pub fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let all: Vec<u64> = bench.working_set(PAGES + PAGES / 10, 9).iter().map(|r| r.pages.start).collect();
    let taken = PAGES.min(all.len() as u64 * 10 / 11) as usize;
    // Of all pages that either touches, 93 % are touched by both.
    let own = (taken as f64 * 0.07 / 1.93).round() as usize;
    let recorded = &all[..taken];
    let replayed: Vec<u64> = all[own..taken + own].to_vec();
    let store = bench.local()?;
    let touched: Vec<TouchedRun> =
        recorded.iter().map(|p| TouchedRun { image: 0, pages: *p..*p + 1 }).collect();
    store.build_stream(&store.open_snapshot(&name("guest")?)?, &touched)?;
    let opened = open(&store, "guest")?;
    let (mapping, memory) = memory_for(&opened)?;
    let machine = Machine::wake(&opened, memory, Policy::default())?;
    machine.fill()?;
    let there = |page: &&u64| machine.handle.page_state(PageIndex(**page)) == Some(PageState::Installed);
    let covered = replayed.iter().filter(there).count();
    for page in &replayed {
        mapping.load(*page as usize * PAGE_BYTES);
    }
    let needed: HashSet<u64> = replayed.iter().copied().collect();
    let vain = recorded.iter().filter(|p| !needed.contains(p)).count();
    let brought = machine.end()?;
    Ok(vec![
        Row::at_least("coverage", "pages", covered as f64, replayed.len() as f64, 0.95),
        Row::at_most("overfetch", "pages", vain as f64, brought as f64, 0.2),
    ])
}
