//! What a VM has before its VMM asks for it, and how it is known.

use std::ops::Range;

use dormouse_chunkstore::TouchedRun;
use dormouse_cloud_hypervisor::{StoredVm, learned};

use super::peer::{Awake, Receive, Slot, Vm, word};
use super::scene::{PAGE, Scene, bare, have_uffd, name};

/// All memory in one file, as of a VM with no more than 3 GiB.
const ONE: [Slot; 1] = [Slot { slot: 0, gpa: 0, bytes: 4 << 20, file_offset: 0 }];
const PAGES: u64 = 1024;
const TOUCHED_ONLY: Receive = Receive { postcopy: true, prefault: false };

fn resumed(scene: &Scene) -> StoredVm {
    StoredVm::resumed(scene.store.open_resume(&name("vm")).unwrap()).unwrap()
}

/// Gives the VM a resume stream of these pages.
fn stream(scene: &Scene, pages: &[Range<u64>]) {
    let snapshot = scene.store.open_snapshot(&name("vm")).unwrap();
    let touched: Vec<_> = pages.iter().map(|p| TouchedRun { image: 0, pages: p.clone() }).collect();
    scene.store.build_stream(&snapshot, &touched).unwrap();
}

fn touch(awake: &Awake, pages: Range<u64>, seed: u64) {
    for page in pages {
        assert_eq!(awake.load(page * PAGE), word(page * PAGE, seed), "page {page}");
    }
}

#[test]
fn a_working_set_is_there_before_the_vmm_asks_and_costs_no_round_trip() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&ONE, 3), "vm", None);
    stream(&scene, &[600..700, 8..136]);
    let (server, awake) = scene.wake_vm(&resumed(&scene), TOUCHED_ONLY, Default::default());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    assert_eq!(awake.requests(), 1, "restoring the devices touched the first page");
    touch(&awake, 8..136, 3);
    touch(&awake, 600..700, 3);
    assert_eq!(awake.requests(), 1, "pages of the working set are not asked for");
    // Everything else is, and is right.
    awake.verify(3);
    assert!(awake.requests() > 512, "only what was there was shown");
    awake.end(true).unwrap();
    let report = server.finish();
    assert_eq!(report.error, None);
    // The peer is in this process, so that the memory is mapped twice here, and shown in both. Zero pages of the set are
    // not in a stream.
    assert!((128..=456).contains(&report.asked.shown), "{report:?}");
}

#[test]
fn what_a_guest_touches_is_shown_to_the_next_one_that_wakes_from_the_snapshot() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&ONE, 4), "vm", None);
    let vm = resumed(&scene);
    // Nothing is prefetched, which would be shown and not be asked for.
    let (server, awake) = scene.wake_vm(&vm, TOUCHED_ONLY, bare());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    touch(&awake, 300..340, 4);
    touch(&awake, 90..100, 4);
    awake.end(true).unwrap();
    let report = server.finish();
    assert_eq!(report.asked.shown, 0, "nothing was there");
    let session = report.session.expect("recorded");
    assert_eq!(session.coverage.missed, 50, "{session:?}");
    let built = learned::better_stream(vm.opened().unwrap(), &session).expect("a stream");
    assert!(built.pages > 0);

    let vm = resumed(&scene);
    let (server, awake) = scene.wake_vm(&vm, TOUCHED_ONLY, Default::default());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    touch(&awake, 300..340, 4);
    touch(&awake, 90..100, 4);
    let asked = awake.requests();
    let zeros = (300..340).chain(90..100).filter(|page| word(page * PAGE, 4) == 0).count() as u64;
    assert!(asked <= 1 + zeros, "{asked} requests");
    awake.end(true).unwrap();
    let session = server.finish().session.expect("recorded");
    assert!(
        learned::better_stream(vm.opened().unwrap(), &session).is_none(),
        "nothing to better: {session:?}"
    );
}

#[test]
fn a_vmm_that_asks_for_all_pages_in_order_teaches_nothing() {
    if !have_uffd() {
        return;
    }
    let scene = Scene::new();
    scene.sleep(&Vm::new(&ONE, 5), "vm", None);
    let vm = resumed(&scene);
    let (server, awake) = scene.wake_vm(&vm, Receive { postcopy: true, prefault: true }, Default::default());
    let (server, awake) = (server.unwrap(), awake.unwrap());
    assert_eq!(awake.end(false).unwrap(), PAGES);
    let session = server.finish().session.expect("recorded");
    assert_eq!(session.missed, []);
}
