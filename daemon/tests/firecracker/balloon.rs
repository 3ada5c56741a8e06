//! A guest that gives pages back through Firecracker's own balloon, while its memory is still on its way. It gives
//! back every other page, so that each lies between pages that stay; what it read of it is in `balloon.S`.

use std::path::Path;
use std::time::Duration;

use dormouse_firecracker::{ApiClient, ApiError};
use dormouse_guest::GuestParams;
use serde_json::{Value, json};

use crate::generations::{Awake, standby, wake};
use crate::scene::{Console, MEMORY_MIB, Machine, PAGES, PATIENCE, Scene, scene, wait_until};
use crate::serve_uffd::count;
use crate::served::{Mortal, Served};

/// Half of the guest's pages, given back in `BATCHES` messages.
const HALF_MIB: u64 = PAGES / 2 * 4 / 1024;
const BATCHES: usize = PAGES as usize / 2 / 256;

fn boot(scene: &Scene) -> Machine {
    let params = GuestParams { balloon: true, ..GuestParams::new(PAGES, 7).unwrap() };
    let machine = scene.boot_guest(&params, |api| {
        api.machine_config(MEMORY_MIB, true).unwrap();
        put_balloon(api).unwrap();
    });
    machine.console.wait_for(".", 1);
    machine
}

fn put_balloon(api: &ApiClient) -> Result<(), ApiError> {
    api.put("/balloon", &json!({"amount_mib": 0, "deflate_on_oom": false}))
}

fn set_balloon(socket: &Path, amount_mib: u64) {
    let api = ApiClient::new(socket, PATIENCE);
    api.request("PATCH", "/balloon", Some(&json!({"amount_mib": amount_mib}))).unwrap();
}

fn actual_mib(socket: &Path) -> u64 {
    // Firecracker tells of the balloon's target in its configuration, of what it has only with statistics.
    let balloon = ApiClient::new(socket, Duration::from_secs(10)).get("/balloon").unwrap();
    balloon["amount_mib"].as_u64().unwrap()
}

/// The snapshot `vm`, of a guest that stands still and finds that half of its pages are wanted back as soon as it
/// goes on.
fn asked_while_asleep(scene: &Scene) {
    let mut machine = boot(scene);
    machine.process.type_bytes(b"p").unwrap();
    machine.console.wait_for("p", 1);
    let socket = scene.path("boot.sock");
    set_balloon(&socket, HALF_MIB);
    standby(scene, "home", &socket, "vm", &[]);
}

/// For each batch taken again, how many of its pages were zero; the others were as in the snapshot.
fn zeros(console: &Console) -> Vec<u64> {
    let said = console.said();
    let numbers = said.split("d00000").skip(1).filter_map(|rest| rest.get(..3));
    numbers.map(|digits| u64::from_str_radix(digits, 16).unwrap()).collect()
}

/// Takes all pages back, and gives how many of them were zero.
fn take_again(console: &Console, socket: &Path) -> u64 {
    let before = zeros(console).len();
    set_balloon(socket, 0);
    wait_until("the pages to be taken again", || {
        console.assert_no_wrong_page();
        zeros(console).len() >= before + BATCHES
    });
    zeros(console).split_off(before).iter().sum()
}

fn pass(console: &Console) {
    let passes = console.times(".");
    // One may have been under way.
    console.wait_for(".", passes + 2);
}

fn socket(awake: &Awake) -> &Path {
    Path::new(awake.document["api_socket"].as_str().unwrap())
}

#[test]
fn pages_in_a_balloon_are_zero_and_all_others_those_of_the_snapshot() {
    let Some(scene) = scene() else { return };
    asked_while_asleep(&scene);
    for (host, options) in [("demand", &["--no-prefetch"][..]), ("prefetch", &[])] {
        let mut awake = wake(&scene, "vm", host, options);
        awake.type_bytes(b"a");
        awake.console.wait_for("i", BATCHES);
        pass(&awake.console);
        assert_eq!(take_again(&awake.console, socket(&awake)), PAGES / 2, "{}", awake.console.said());
        // All are its own again, and used: the answer reads them as well. Then once more.
        let answers = awake.console.times("A");
        awake.console.wait_for("A", answers + 1);
        pass(&awake.console);
        set_balloon(socket(&awake), HALF_MIB);
        awake.console.wait_for("i", 2 * BATCHES);
        assert_eq!(take_again(&awake.console, socket(&awake)), PAGES / 2, "{}", awake.console.said());
        pass(&awake.console);
        awake.console.assert_no_wrong_page();
        awake.kill_vm();
        awake.done();
        let report = awake.report();
        assert_eq!(report["failures"], Value::Array(vec![]), "{report}");
        // No two pages given back are neighbours, so each is a range.
        assert_eq!(count(&report, "removes"), PAGES, "{report}");
        assert_eq!(count(&report, "prefetched_pages") > 0, options.is_empty(), "{report}");
    }
}

#[test]
fn a_guest_sleeps_and_wakes_with_pages_in_its_balloon() {
    let Some(scene) = scene() else { return };
    asked_while_asleep(&scene);
    let mut awake = wake(&scene, "vm", "host1", &[]);
    awake.type_bytes(b"a");
    awake.console.wait_for("i", BATCHES);
    pass(&awake.console);
    let second = standby(&scene, "host1", socket(&awake), "second", &[]);
    assert_eq!((&second["kind"], &second["parent"]), (&"diff".into(), &"vm".into()), "{second}");
    awake.done();

    let mut awake = wake(&scene, "second", "host2", &[]);
    pass(&awake.console);
    assert_eq!(actual_mib(socket(&awake)), HALF_MIB);
    awake.type_bytes(b"m");
    awake.console.wait_for("M", 1);
    // None was written, so the difference holds none, and they are what the first snapshot holds.
    assert_eq!(take_again(&awake.console, socket(&awake)), 0, "{}", awake.console.said());
    pass(&awake.console);
    let third = standby(&scene, "host2", socket(&awake), "third", &[]);
    assert_eq!((&third["kind"], &third["parent"]), (&"diff".into(), &"second".into()), "{third}");
    awake.done();
    awake.console.assert_no_wrong_page();

    let mut awake = wake(&scene, "third", "host3", &[]);
    pass(&awake.console);
    awake.type_bytes(b"g");
    awake.console.wait_for("g00000001", 1);
    awake.console.assert_no_wrong_page();
    awake.end();
}

#[test]
fn the_daemon_counts_what_guests_give_back() {
    let Some(scene) = scene() else { return };
    let machine = boot(&scene);
    standby(&scene, "host", &scene.path("boot.sock"), "vm", &[]);
    drop(machine);
    let served = Served::start(&scene, &[]);
    let (vm, console) = served.wake(&scene, "vm", json!({}));
    let _mortal = Mortal::of(&vm);
    let api = Path::new(vm["api_socket"].as_str().unwrap());
    assert_eq!(served.metric("dormouse_pages_given_back_total"), 0.0);
    set_balloon(api, HALF_MIB);
    console.wait_for("i", BATCHES);
    pass(&console);
    assert_eq!(served.metric("dormouse_pages_given_back_total"), PAGES as f64 / 2.0);
    assert_eq!(take_again(&console, api), PAGES / 2, "{}", console.said());
    pass(&console);
    console.assert_no_wrong_page();
}

/// As docs/FIRECRACKER.md has it. Where this fails, Firecracker has learnt it, and it is to be tested.
#[test]
fn firecracker_takes_no_balloon_with_huge_pages() {
    let Some(scene) = scene() else { return };
    let machine = scene.start("huge");
    let api = machine.process.api(PATIENCE);
    let config = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": "2M"});
    api.put("/machine-config", &config).unwrap();
    let refused = put_balloon(&api).unwrap_err();
    assert!(matches!(refused, ApiError::Refused { status: 400, .. }), "{refused}");
}
