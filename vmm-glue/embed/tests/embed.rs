//! Dormouse linked into a VMM: machines go on standby in a store and wake from it, their pages on demand.

mod embed_support;

use dormouse_embed::{Keep, Prefetch, Sleep, Template, Tier};
use dormouse_guest::{Command, park_and_pause};
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
    let stored = dormouse_embed::stored_working_set(&snapshot).expect("readable");
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
    let report = dormouse_embed::build_stream(&snapshot, &runs).expect("built");
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

/// A stream of all that the guest touches, made from what one machine faulted.
fn with_stream(bed: &Bed) {
    bed.boot("machine");
    let awake = bed.wake("machine", Prefetch::Nothing);
    awake.verified();
    let report = awake.woken.improve_stream().expect("built").expect("there was none");
    assert!(report.pages >= PAGES, "{report:?}");
    awake.end();
}

fn machines_wake_from_first_pages_that_stay_in_memory(host: Host) {
    let bed = Bed::far(host);
    with_stream(&bed);
    for keep in [Keep::Hot, Keep::AsNeeded] {
        let template = Template::open(&bed.store, &name("machine"), keep).expect("stored");
        assert_eq!(template.tier() == Tier::Hot, keep == Keep::Hot);
        for machine in 0..3 {
            let awake = bed.wake_from(&template, Prefetch::WorkingSet);
            awake.verified();
            assert_eq!(template.tier() == Tier::Hot, keep == Keep::Hot || machine > 0, "{keep:?} {machine}");
            assert!(awake.woken.improve_stream().expect("a page map").is_none(), "the stream is good");
            let counters = awake.end();
            assert!(counters.fetches <= 8, "what it touches came with the stream: {counters:?}");
        }
    }
}

/// What is kept of a stream, and where, is for the policy to say.
fn first_pages_are_where_they_are_to_be(host: Host) {
    let bed = Bed::far(host);
    with_stream(&bed);
    let cool = || bed.store.cool(&name("machine"));
    cool();
    // Kept by the policy: (before anything woke, after a machine has).
    for (keep, before, after) in [
        (Keep::Cold, Tier::Cold, Tier::Cold),
        (Keep::AsNeeded, Tier::Cold, Tier::Warm),
        (Keep::Warm, Tier::Warm, Tier::Warm),
        (Keep::Cold, Tier::Cold, Tier::Cold),
    ] {
        let template = Template::open(&bed.store, &name("machine"), keep).expect("stored");
        assert_eq!(template.tier(), before, "{keep:?}");
        let awake = bed.wake_from(&template, Prefetch::WorkingSet);
        awake.verified();
        embed_support::until("the stream", || {
            awake.woken.restore().timeline().phases.iter().any(|p| p.name == "stream ready")
        });
        if after == Tier::Warm {
            embed_support::until("the stream to be kept", || template.tier() == after);
        }
        awake.end();
        // The decoder may be about to keep it: it holds what was opened for as long as it runs.
        drop(template);
        let again = Template::open(&bed.store, &name("machine"), Keep::AsNeeded).expect("stored");
        assert_eq!(again.tier(), after, "{keep:?}");
        drop(again);
        if keep == Keep::AsNeeded {
            assert!(cool());
        }
    }
}

/// Blocks that come whole are moved into place; what the guest finds there is right.
fn whole_blocks_are_moved(host: Host) {
    let bed = Bed::new(host);
    with_stream(&bed);
    let awake = bed.wake_filled("machine", Prefetch::WorkingSet);
    awake.verified();
    let counters = awake.end();
    assert!(counters.prefetched_pages >= PAGES && counters.faults <= 8, "{counters:?}");
    if counters.move_ioctls == 0 || counters.moved_pages == 0 {
        let thp = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        assert!(
            thp.contains("[never]") || thp.is_empty() || counters.move_ioctls == 1,
            "nothing was moved: {counters:?}"
        );
        dormouse_testkit::skipped!("this kernel does not move blocks");
        return;
    }
    // The pattern begins on a boundary of 2 MiB, and ends on one in each region.
    assert!(counters.moved_pages >= PAGES, "{counters:?}");
    assert_eq!(counters.moved_pages % 512, 0, "{counters:?}");
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
    let refused = dormouse_embed::wake(&snapshot, &REGIONS[..1], bed.how(Prefetch::Nothing).0);
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
    machines_wake_from_first_pages_that_stay_in_memory,
    first_pages_are_where_they_are_to_be,
    whole_blocks_are_moved,
    ten_generations,
    damage_fails_closed,
    other_regions_are_refused,
);
