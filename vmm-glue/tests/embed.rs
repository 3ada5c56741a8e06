//! Dormouse linked into a VMM: machines go on standby in a store and wake from it, their pages on demand.

mod embed_support;

use dormouse_vmm_glue::embed::{Prefetch, Sleep};
use dormouse_vmm_glue::guest::{Command, park_and_pause};
use embed_support::{Bed, Host, PAGES, PATIENCE, REGIONS, have, name, state_id};

fn wakes_and_verifies_everything(host: Host) {
    let bed = Bed::new(host);
    bed.boot("machine");
    // Nothing brought in: the guest faults for what it reads, and finds all of it right.
    let awake = bed.wake("machine", Prefetch::Nothing);
    awake.verified();
    let runs = awake.woken.working_set().expect("page map");
    let counters = awake.end();
    assert!(counters.faults >= PAGES / 32, "one fault a frame at least: {counters:?}");
    assert_eq!((counters.prefetched_pages, counters.poisoned), (0, 0));
    assert!(runs.iter().map(|r| r.pages).sum::<u64>() >= PAGES);

    // All that it touches brought in before it runs: next to nothing faults.
    let awake = bed.wake_filled("machine", Prefetch::Runs(runs));
    awake.verified();
    let counters = awake.end();
    assert!(counters.faults <= 8, "all was there: {counters:?}");
    assert!(counters.prefetched_pages >= PAGES);
}

fn remembers_what_it_touched(host: Host) {
    let bed = Bed::new(host);
    bed.boot("machine");
    let mut awake = bed.wake("machine", Prefetch::Nothing);
    awake.verified();
    let runs = awake.woken.working_set().expect("page map");
    park_and_pause(&mut *awake.guest, PATIENCE).expect("park");
    let dirty = awake.guest.take_dirty().expect("log").expect("tracked");
    let sleep = Sleep::new(name("machine")).parent(name("machine")).dirty(dirty).working_set(runs.clone());
    let state = awake.guest.save_state().expect("state");
    let report = sleep.state(state_id(), state).store(&bed.store, awake.woken.memory()).expect("sleep");
    assert!(report.read_bytes < 1 << 20, "only what changed is read: {report:?}");
    awake.end();

    let snapshot = bed.store.open_snapshot(&name("machine")).expect("stored");
    let stored = dormouse_vmm_glue::embed::stored_working_set(&snapshot).expect("readable");
    assert_eq!(stored, Some(runs));
    let awake = bed.wake_filled("machine", Prefetch::WorkingSet);
    awake.verified();
    let counters = awake.end();
    assert!(counters.faults <= 8 && counters.prefetched_pages >= PAGES, "{counters:?}");
}

fn wakes_from_its_stream(host: Host) {
    let bed = Bed::new(host);
    bed.boot("machine");
    let awake = bed.wake("machine", Prefetch::Nothing);
    awake.verified();
    let runs = awake.woken.working_set().expect("page map");
    awake.end();
    let snapshot = bed.store.open_snapshot(&name("machine")).expect("stored");
    let report = dormouse_vmm_glue::embed::build_stream(&snapshot, &runs).expect("built");
    assert!(report.pages >= PAGES, "{report:?}");

    let awake = bed.wake_filled("machine", Prefetch::WorkingSet);
    awake.verified();
    let counters = awake.end();
    assert!(counters.faults <= 8 && counters.prefetched_pages >= PAGES, "{counters:?}");
    assert_eq!(counters.fetches, 0, "all of it came with the stream: {counters:?}");
}

/// What one session touched is the stream of the next, and pages held out of it say what it is worth.
fn sleeps_with_a_stream_and_measures_it(host: Host) {
    let mut bed = Bed::new(host);
    bed.boot("machine");
    let mut awake = bed.wake("machine", Prefetch::Nothing);
    awake.verified();
    let runs = awake.woken.working_set().expect("page map");
    park_and_pause(&mut *awake.guest, PATIENCE).expect("park");
    let state = awake.guest.save_state().expect("state");
    let sleep = Sleep::new(name("machine")).parent(name("machine")).working_set(runs);
    sleep.state(state_id(), state).store(&bed.store, awake.woken.memory()).expect("sleep");
    awake.end();

    bed.sample = true;
    let awake = bed.wake("machine", Prefetch::WorkingSet);
    awake.verified();
    let seen = awake.woken.session().expect("page map");
    let counted = seen.coverage;
    assert!(counted.set_pages >= PAGES && counted.sampled_touched > 0, "{counted:?}");
    assert!(counted.missed <= 8 && counted.coverage() > Some(0.95), "{counted:?}");
    // What was held out and not needed is left out of the next stream, and all else stays.
    let next: u64 = awake.woken.working_set().expect("page map").iter().map(|r| r.pages).sum();
    assert!(next + counted.sampled_untouched >= counted.set_pages, "{next}: {counted:?}");
    awake.end();
}

/// Each stored as what changed since the one before; all of them can be woken afterwards.
fn ten_generations(host: Host) {
    let bed = Bed::new(host);
    bed.boot("g0");
    for generation in 1..=10u32 {
        let parent = format!("g{}", generation - 1);
        let mut awake = bed.wake_with(&parent, Prefetch::Nothing, Command::Mutate);
        awake.verified();
        assert_eq!(awake.guest.console().generation(), Some(generation));
        park_and_pause(&mut *awake.guest, PATIENCE).expect("park");
        let dirty = awake.guest.take_dirty().expect("log").expect("tracked");
        let state = awake.guest.save_state().expect("state");
        let sleep = Sleep::new(name(&format!("g{generation}"))).parent(name(&parent)).dirty(dirty);
        let report = sleep.state(state_id(), state).store(&bed.store, awake.woken.memory()).expect("sleep");
        assert!(report.new_bytes < PAGES * 4096 / 4, "an eighth of the pages changed: {report:?}");
        awake.end();
    }
    for generation in 0..=10u32 {
        let awake = bed.wake(&format!("g{generation}"), Prefetch::Everything);
        awake.verified();
        assert_eq!(awake.guest.console().generation(), Some(generation));
        awake.end();
    }
}

/// The pages in the store are damaged: the machine stops, and never sees a wrong page.
fn damage_fails_closed(host: Host) {
    for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
        let bed = Bed::new(host);
        bed.boot("machine");
        bed.damage_pages();
        let awake = bed.wake("machine", prefetch);
        let why = awake.withheld();
        assert!(why.contains("withheld") && why.contains("pack"), "says what and why: {why}");
        let console = awake.guest.console();
        let said = (console.count(b'.'), console.count(b'X'), console.count(b'x'), console.wrong_total());
        assert_eq!(said, (0, 0, 0, 0), "{}", console.text());
        awake.end();
    }
}

fn other_regions_are_refused(host: Host) {
    let bed = Bed::new(host);
    bed.boot("machine");
    let snapshot = bed.store.open_snapshot(&name("machine")).expect("stored");
    let refused = dormouse_vmm_glue::embed::wake(&snapshot, &REGIONS[..1], bed.how(Prefetch::Nothing).0);
    assert!(refused.expect_err("refused").to_string().contains("give those it was stored with"));
}

#[test]
fn memory_stays_while_a_machine_uses_it() {
    if !have(Host::Process) {
        return;
    }
    let bed = Bed::new(Host::Process);
    bed.boot("machine");
    let awake = bed.wake("machine", Prefetch::Nothing);
    // The restore's owner goes first, against the rules: the machine is served all the same.
    let embed_support::Awake { guest, woken, .. } = awake;
    drop(woken);
    guest.console().wait_for(b'.', 1, PATIENCE).expect("verified");
    assert_eq!(guest.console().wrong_total(), 0);
}

macro_rules! on_both_hosts {
    ($($case:ident),* $(,)?) => {
        mod kvm { $(#[test] fn $case() { if super::have(super::Host::Kvm) { super::$case(super::Host::Kvm) } })* }
        mod process {
            $(#[test] fn $case() { if super::have(super::Host::Process) { super::$case(super::Host::Process) } })*
        }
    };
}
on_both_hosts!(
    wakes_and_verifies_everything,
    remembers_what_it_touched,
    wakes_from_its_stream,
    sleeps_with_a_stream_and_measures_it,
    ten_generations,
    damage_fails_closed,
    other_regions_are_refused,
);
