//! VMs outlive the process that serves them: `serve-uffd --keep`, killed at any instant.
//!
//! The guests are processes of their own that hand over a userfaultfd as Firecracker does, read, write and give back
//! their memory, and check every page they look at. With `DORMOUSE_REQUIRE_UFFD` set, that there can be none is a
//! failure. `DORMOUSE_TEST_KILLS` and `DORMOUSE_TEST_SEED` choose how often and in which order.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod guest;
mod scene;
mod systemd;

use std::time::{Duration, Instant};

use scene::{Rng, number, scene};

/// Guests at a time.
const GUESTS: usize = 3;

#[test]
fn servers_killed_at_any_instant_leave_no_wrong_page_and_no_guest_behind() {
    let Some(scene) = scene() else { return };
    let (kills, seed) = (number("DORMOUSE_TEST_KILLS", 200), number("DORMOUSE_TEST_SEED", 1));
    eprintln!("{kills} kills from seed {seed}");
    let mut rng = Rng(seed);
    let mut guests = Vec::new();
    let (mut completed, mut not_begun, mut faulting, mut pauses) = (0, 0, 0, Vec::new());
    let mut server = scene.serve(&["--keep", "--no-prefetch"]);
    for kill in 0..kills {
        while guests.len() < GUESTS {
            guests.push(scene.guest(rng.next()));
        }
        // Every other server is killed at any instant, perhaps before it has done anything; the others with a guest.
        if kill % 2 == 1 {
            scene::wait_until("a guest's first page", || guests.iter().any(scene::Guest::has_begun));
        }
        std::thread::sleep(Duration::from_micros(rng.below(60_000)));
        server.kill();
        let killed = Instant::now();
        // A VM that has not got a page yet is loaded anew, as after any load that fails.
        guests.retain(|guest: &scene::Guest| {
            not_begun += u64::from(!guest.has_begun());
            guest.has_begun()
        });
        faulting += u64::from(guests.iter().any(|guest| !guest.is_done()));
        let prefetch = rng.below(4) == 0;
        server = scene.serve(if prefetch { &["--keep"] } else { &["--keep", "--no-prefetch"] });
        if kill % 4 == 3 {
            guests.iter().for_each(scene::Guest::must_go_on);
            pauses.push(killed.elapsed());
        }
        guests.retain_mut(|guest| !guest.completed(&mut completed));
    }
    for mut guest in guests {
        guest.must_complete();
        completed += 1;
    }
    server.kill();
    pauses.sort();
    eprintln!(
        "{kills} kills, {faulting} of them under running guests; {completed} guests completed, {not_begun} loaded anew; \
         all went on {:?} after a kill (median)",
        pauses.get(pauses.len() / 2)
    );
    assert!(completed > 0 && faulting * 4 > kills, "{completed} completed, {faulting} of {kills}");
}

#[test]
fn a_server_that_is_asked_to_end_is_followed_by_another() {
    let Some(scene) = scene() else { return };
    let mut server = scene.serve(&["--keep", "--no-prefetch"]);
    let mut guest = scene.guest(5);
    guest.wait_begun();
    for signal in [scene::TERM, scene::HUP, scene::INT] {
        server.end_by(signal);
        server = scene.serve(&["--keep", "--no-prefetch"]);
        guest.must_go_on();
    }
    guest.must_complete();
    server.kill();
}

#[test]
fn a_guest_that_ends_while_nobody_serves_it_holds_up_nobody() {
    let Some(scene) = scene() else { return };
    let server = scene.serve(&["--keep", "--no-prefetch"]);
    let (ending, mut staying) = (scene.guest(12), scene.guest(13));
    ending.wait_begun();
    staying.wait_begun();
    server.kill();
    drop(ending);
    let server = scene.serve(&["--keep", "--no-prefetch"]);
    staying.must_complete();
    let mut next = scene.guest(14);
    next.must_complete();
    server.kill();
}

#[test]
fn the_holder_may_be_killed_too_if_the_server_lives() {
    let Some(scene) = scene() else { return };
    let mut server = scene.serve(&["--keep", "--no-prefetch"]);
    for seed in [6, 16, 26] {
        let mut guest = scene.guest(seed);
        guest.wait_begun();
        scene.kill_holder();
        scene.wait_for_holder(&guest);
        server.kill();
        server = scene.serve(&["--keep", "--no-prefetch"]);
        guest.must_complete();
    }
    server.kill();
}

#[test]
fn what_is_filled_is_let_go_and_needs_nobody() {
    let Some(scene) = scene() else { return };
    let mut server = scene.serve(&["--keep", "--detach-when-filled", "--once"]);
    let mut guest = scene.guest(7);
    server.must_end_well();
    scene.kill_holder();
    guest.must_complete();
}

#[test]
fn what_is_let_go_by_a_second_server_needs_nobody_either() {
    let Some(scene) = scene() else { return };
    let server = scene.serve(&["--keep", "--no-prefetch"]);
    let mut guest = scene.guest(8);
    guest.wait_begun();
    server.kill();
    let mut server = scene.serve(&["--keep", "--detach-when-filled", "--once"]);
    server.must_end_well();
    scene.kill_holder();
    guest.must_complete();
}

#[test]
fn the_snapshot_is_found_by_its_id_when_its_name_has_moved() {
    let Some(scene) = scene() else { return };
    let server = scene.serve(&["--keep", "--no-prefetch"]);
    let mut guest = scene.guest(9);
    guest.wait_begun();
    server.kill();
    scene.import_something_else_as_vm();
    let server = scene.serve(&["--keep", "--no-prefetch"]);
    guest.must_complete();
    server.kill();
}

#[test]
fn systemd_keeps_the_vms_of_a_service() {
    let Some(scene) = scene() else { return };
    let manager = systemd::Manager::start(scene.path("notify"));
    let mut server = scene.serve_under(&manager, &["--keep", "--no-prefetch"]);
    let mut guests = [10, 11].map(|seed| scene.guest(seed));
    guests.iter().for_each(scene::Guest::wait_begun);
    for _ in 0..5 {
        server.kill();
        server = scene.serve_under(&manager, &["--keep", "--no-prefetch"]);
        guests.iter().for_each(scene::Guest::must_go_on);
    }
    assert!(!scene.path("uffd.keep").exists(), "no holder of our own was started");
    guests.iter_mut().for_each(scene::Guest::must_complete);
    scene::wait_until("the store to be empty", || manager.stored() == 0);
    server.kill();
}
