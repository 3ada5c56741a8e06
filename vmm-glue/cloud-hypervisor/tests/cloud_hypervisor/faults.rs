//! Pages on demand: how many round trips and fetches they take, and what comes of those that cannot be had.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dormouse_cloud_hypervisor::{GuestRange, OnDemand, WakeError, WakeOptions, wake_on_demand};
use dormouse_core::OnFailure;

use super::peer::{Awake, Receive, Slot, Vm, word};
use super::scene::{PAGE, PAGES, SLOTS, Scene, bare, have_uffd, until};

/// Asks for what is touched, and nothing else.
const TOUCHED_ONLY: Receive = Receive { postcopy: true, prefault: false };

#[test]
fn a_page_costs_one_round_trip_and_brings_its_frame() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 1), "vm", None);
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, bare());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    // Restoring the devices touched the first page.
    assert_eq!(awake.requests(), 1);
    for page in 0..256 {
        assert_eq!(awake.load(page * PAGE), word(page * PAGE, 1));
    }
    assert_eq!(awake.requests(), 256, "one request for each page touched, and none for others");
    let held = awake.held_bytes();
    assert_eq!(awake.end(true).unwrap(), 256);
    let report = server.finish();
    let counters = report.images[0].counters;
    assert_eq!((report.asked.requests, report.asked.pages), (256, 256));
    // About 170 pages with bytes, 32 of them in a frame.
    assert!((5..=16).contains(&report.asked.fetches), "a frame is fetched once: {report:?}");
    assert!(report.asked.present >= 256 - 64, "neighbours come with a page: {report:?}");
    assert_eq!(report.images[1].counters.pages_copied, 0, "nothing of what nobody touched");
    assert_eq!((counters.faults, counters.fetches), (0, 0), "answered by the thread that was asked");
    let installed = counters.pages_copied + counters.zero_pages;
    assert_eq!(held, installed * PAGE, "only pages that were put there are there");
    assert!(installed < 256 + 64 + 32);
}

#[test]
fn prefetched_pages_are_answered_at_once() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 2), "vm", None);
    let (server, awake) = scene.wake("vm", Receive { postcopy: true, prefault: true }, Default::default());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    until("all to be prefetched", || awake.held_bytes() >= PAGES * PAGE);
    awake.verify(2);
    awake.end(false).unwrap();
    let report = server.finish();
    // The VMM asks for what it was shown as well, once. With all of it there, nothing is fetched for it.
    assert_eq!(report.asked.requests, PAGES);
    assert!(report.asked.present > 0, "{report:?}");
}

#[test]
fn a_page_the_guest_gave_back_is_zero_whether_it_had_touched_it_or_not() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 1), "vm", None);
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, bare());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    // Two pages of one run of eight, which is not zero: the second comes with the first.
    let run = (0..).step_by(8).map(|p| p * PAGE).find(|gpa| word(*gpa, 1) != 0).unwrap();
    let (touched, neighbour, other) = (run, run + PAGE, run + 2 * PAGE);
    assert_ne!(awake.load(touched), 0);
    awake.give_back(touched);
    awake.give_back(neighbour);
    assert_eq!((awake.load(touched), awake.load(neighbour)), (0, 0));
    assert_eq!(awake.load(other), word(other, 1), "the others are not disturbed");
    awake.end(true).unwrap();
    let report = server.finish();
    assert_eq!((report.asked.given_back, report.error), (2, None));
}

#[test]
fn a_vmm_that_was_not_told_to_ask_for_pages_never_runs_its_guest() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 1), "vm", None);
    let (server, awake) = scene.wake("vm", Receive { postcopy: false, prefault: false }, Default::default());
    assert!(matches!(server, Err(WakeError::NotPostcopy)));
    assert!(awake.err().unwrap().contains("ended by command 6"), "the VMM was told to give up");
}

#[test]
fn a_vm_whose_devices_others_run_is_not_woken_on_demand() {
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 1), "vm", None);
    let mut vm = scene.stored("vm");
    let text = String::from_utf8(vm.config.clone()).unwrap();
    vm.config = text.replace(r#""vhost_user":false"#, r#""vhost_user":true"#).into_bytes();
    let connect = || unreachable!("nobody is connected to");
    let woken = wake_on_demand(&vm, connect, true, Default::default(), &mut |_| {});
    assert!(matches!(woken, Err(WakeError::ForeignDevice("a vhost-user disk"))));
}

/// Takes the store away, so that only what was read before is still to be had.
fn lose_store(scene: &Scene) {
    std::fs::rename(scene.path("store"), scene.path("away")).unwrap();
}

/// A VM whose first page is zero, and the address of one of its pages that is not.
fn with_a_zero_page_first(scene: &Scene) -> u64 {
    let seed = (0..).find(|seed| word(0, *seed) == 0).unwrap();
    scene.sleep(&Vm::new(&SLOTS, seed), "vm", None);
    (0..).map(|p| p * PAGE).find(|gpa| word(*gpa, seed) != 0).unwrap()
}

/// The guest touches a page that does not come, and waits for ever. Whether it came all the same.
fn touch(awake: &Arc<Awake>, gpa: u64) -> Arc<AtomicBool> {
    let (before, vcpu, came) = (awake.requests(), awake.clone(), Arc::new(AtomicBool::new(false)));
    let seen = came.clone();
    std::thread::spawn(move || {
        vcpu.load(gpa);
        seen.store(true, Ordering::Release);
    });
    until("a request", || awake.requests() > before);
    came
}

#[test]
fn a_page_that_cannot_be_had_ends_the_vm_and_is_never_zero() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let gpa = with_a_zero_page_first(&scene);
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, bare());
    let (server, awake) = (server.unwrap(), Arc::new(awake.unwrap()));
    lose_store(&scene);
    let came = touch(&awake, gpa);
    let report = server.finish();
    assert!(!came.load(Ordering::Acquire), "a page that was lost was given to the guest");
    assert!(report.killed_because.is_some_and(|why| why.contains("page")), "says why");
    assert_eq!(report.asked.requests, awake.requests());
}

#[test]
fn a_vmm_that_dies_while_it_waits_for_a_page_is_let_go() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let gpa = with_a_zero_page_first(&scene);
    let patient = WakeOptions { prefetch: false, ..Default::default() };
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, patient);
    let (server, awake) = (server.unwrap(), Arc::new(awake.unwrap()));
    lose_store(&scene);
    let came = touch(&awake, gpa);
    awake.die();
    let report = server.finish();
    assert!(!came.load(Ordering::Acquire), "a page that was lost was given to the guest");
    assert_eq!((report.error, report.killed_because), (None, None));
}

#[test]
fn a_vm_to_be_held_waits_for_its_lost_page_and_is_not_answered() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let gpa = with_a_zero_page_first(&scene);
    let held = WakeOptions { on_failure: OnFailure::Hold, ..bare() };
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, held);
    let (server, awake) = (server.unwrap(), Arc::new(awake.unwrap()));
    lose_store(&scene);
    let came = touch(&awake, gpa);
    until("the page to be given up", || server.counts().withheld == 1);
    assert!(!came.load(Ordering::Acquire) && !awake.handler_ended(), "it still waits");
    awake.die();
    let report = server.finish();
    assert_eq!((report.error, report.killed_because, report.asked.retries), (None, None, 2));
    assert!(!came.load(Ordering::Acquire), "a page that was lost was given to the guest");
}

#[test]
fn a_store_that_comes_back_lets_the_guest_go_on() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let gpa = with_a_zero_page_first(&scene);
    let patient = WakeOptions { prefetch: false, ..Default::default() };
    let (server, awake) = scene.wake("vm", TOUCHED_ONLY, patient);
    let (server, awake) = (server.unwrap(), awake.unwrap());
    lose_store(&scene);
    std::thread::scope(|scope| {
        let touched = scope.spawn(|| awake.load(gpa));
        until("the store to be asked again", || server.counts().retries > 0);
        std::fs::rename(scene.path("away"), scene.path("store")).unwrap();
        assert_ne!(touched.join().unwrap(), 0);
    });
    awake.end(true).unwrap();
    let report = server.finish();
    assert!(report.asked.retries > 0, "it was tried again");
}

#[test]
fn a_range_outside_the_guest_is_refused() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&[Slot { slot: 0, gpa: PAGE, bytes: 1 << 20, file_offset: 0 }], 1), "vm", None);
    let memory = OnDemand::start(&scene.stored("vm").sources(), bare()).unwrap();
    for (address, length) in [(0, PAGE), (1 << 20, 2 * PAGE), (1 << 40, PAGE), (0, 2 * PAGE)] {
        let error = memory.provide(GuestRange { address, length }).unwrap_err().to_string();
        assert!(error.contains("in no memory slot"), "{error}");
    }
    // A huge page's worth is given whole.
    memory.provide(GuestRange { address: PAGE, length: 1 << 20 }).unwrap();
    assert_eq!(memory.counts().pages, 256);
    memory.end();
    assert!(memory.provide(GuestRange { address: PAGE, length: PAGE }).is_err(), "nobody is served any more");
}
