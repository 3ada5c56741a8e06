//! To sleep and to wake, with every byte compared.

use super::peer::{Awake, Receive, Slot, Vm};
use super::scene::{PAGE, PAGES, PATIENCE, SLOTS, Scene, bare, have_uffd, name, received_from};

const LIKE_UPSTREAM: Receive = Receive { postcopy: true, prefault: true };

#[test]
fn a_vm_wakes_on_demand_with_every_byte_and_then_goes_its_own_way() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let vm = Vm::new(&SLOTS, 1);
    let report = scene.sleep(&vm, "vm", None);
    assert_eq!(report.logical_bytes, PAGES * PAGE);
    drop(vm);
    let (server, awake) = scene.wake("vm", LIKE_UPSTREAM, Default::default());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    assert!(awake.ran && awake.state == b"{\"id\":\"vm\",\"seed\":1}");
    awake.verify(1);
    // The VMM asks for each page once, hangs up when it has them all, and the server lets go.
    let report = server.finish();
    assert_eq!((report.asked.requests, report.asked.pages), (PAGES, PAGES));
    assert_eq!((report.error, report.killed_because, report.asked.given_back), (None, None, 0));
    let installed: u64 = report.images.iter().map(|i| i.counters.pages_copied + i.counters.zero_pages).sum();
    assert_eq!(installed, PAGES, "each page was put in place once");
    // What was stored stays as it is, whatever the guest does now.
    awake.store(0, 7);
    assert_eq!(awake.end(false).unwrap(), PAGES);
    let (server, awake) = scene.wake("vm", LIKE_UPSTREAM, Default::default());
    awake.unwrap().verify(1);
    server.unwrap().finish();
}

#[test]
fn a_vm_wakes_eagerly_with_every_byte_and_its_holes() {
    let scene = Scene::new();
    let vm = Vm::new(&SLOTS, 2);
    let report = scene.sleep(&vm, "vm", None);
    let awake = scene.wake_eagerly("vm");
    assert!(!awake.ran, "it was to stay paused");
    assert_eq!(awake.held_bytes(), report.nonzero_bytes, "zero pages stay holes");
    awake.verify(2);
}

#[test]
fn slots_that_share_a_memory_file_share_an_image() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let slots = [
        Slot { slot: 5, gpa: 4 << 30, bytes: 1 << 20, file_offset: 2 << 20 },
        Slot { slot: 1, gpa: 0, bytes: 2 << 20, file_offset: 0 },
    ];
    scene.sleep(&Vm::new(&slots, 3), "vm", None);
    let snapshot = scene.store.open_snapshot(&name("vm")).unwrap();
    let images: Vec<_> = snapshot.images().map(|i| i.entry().id.to_string()).collect();
    assert_eq!(images, ["memory"]);
    let (server, awake) = scene.wake("vm", LIKE_UPSTREAM, Default::default());
    awake.unwrap().verify(3);
    server.unwrap().finish();
    scene.wake_eagerly("vm").verify(3);
}

#[test]
fn each_of_several_memory_files_is_an_image_named_for_its_slots() {
    let scene = Scene::new();
    scene.sleep(&Vm::new(&SLOTS, 4), "vm", None);
    let snapshot = scene.store.open_snapshot(&name("vm")).unwrap();
    let images: Vec<_> = snapshot.images().map(|i| i.entry().id.to_string()).collect();
    assert_eq!(images, ["memory-0", "memory-2"]);
}

/// Pages that had not come yet were stored as zeros.
#[test]
fn memory_that_is_still_filled_is_not_put_on_standby() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let vm = Vm::new(&SLOTS, 6);
    scene.sleep(&vm, "vm", None);
    let when_asked = Receive { postcopy: true, prefault: false };
    let (server, awake) = scene.wake("vm", when_asked, bare());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    let refused = |awake: &Awake| {
        let half = Vm { slots: awake.memory(), state: vm.state.clone() };
        let answer = received_from(PATIENCE, move |near| {
            half.send(&near, true).expect_err("it goes on");
        });
        let error = answer.expect_err("most of it is not there").to_string();
        assert!(error.contains("still on their way"), "{error}");
    };
    refused(&awake);
    // Nobody fills another any more, and most of it never came.
    let (ended, left) = scene.wake("vm", when_asked, bare());
    let left = left.unwrap();
    left.die();
    ended.unwrap().finish();
    refused(&left);

    awake.verify(6);
    awake.die();
    server.finish();
    let whole = Vm { slots: awake.memory(), state: vm.state.clone() };
    scene.sleep(&whole, "again", Some("vm"));
    scene.wake_eagerly("again").verify(6);
}

#[test]
fn ten_generations_each_cost_what_changed_and_stay_restorable() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    let mut vm = Vm::new(&SLOTS, 5);
    scene.sleep(&vm, "generation-0", None);
    for generation in 1..=10_u64 {
        let (server, awake) =
            scene.wake(&format!("generation-{}", generation - 1), LIKE_UPSTREAM, Default::default());
        let awake = awake.unwrap();
        // Four pages change, others each time.
        for page in 0..4 {
            awake.store((page * 10 + generation) * PAGE, generation);
        }
        server.unwrap().finish();
        vm.slots = awake.take_memory();
        let parent = format!("generation-{}", generation - 1);
        let report = scene.sleep(&vm, &format!("generation-{generation}"), Some(&parent));
        assert_eq!(report.new_bytes, 4 * PAGE, "generation {generation}");
    }
    let oldest = scene.wake_eagerly("generation-0");
    oldest.verify(5);
    let newest = scene.wake_eagerly("generation-10");
    for generation in 1..=10_u64 {
        assert_eq!(newest.load((30 + generation) * PAGE), generation);
    }
}
