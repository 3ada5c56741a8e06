//! The write of a reference whose answer is lost, and a store that stays away: as long as nobody can tell whether the
//! snapshot is durable, its guest stands still.

use std::time::Duration;

use serde_json::{Value, json};

use crate::generations::wake;
use crate::held_store::{HeldStore, Hold};
use crate::interrupted::{kill_in_standby, start, state};
use crate::scene::{PATIENCE, Running, document, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, is_there};
use crate::slow_s3::use_store;
use crate::two_standbys::{error, standby};

#[test]
fn a_guest_whose_snapshot_may_be_durable_stands_still_until_that_is_known() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    store.hold(Hold::ThenAway);
    let failure = error(&mut standby(&scene, &store, "later", &[]));
    assert!(scene.path("store/plain/refs/later").exists(), "the snapshot is durable");
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Paused", "{failure}");
    assert_eq!((&failure["kind"], &failure["retryable"]), (&json!("unavailable"), &json!(true)), "{failure}");
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("not known whether") && !message.contains("nothing was stored"), "{message}");
    let passes = machine.console.times(".");

    store.come_back();
    let finished = document(&standby(&scene, &store, "later", &[]).output().unwrap());
    assert_eq!((&finished["ended"], &finished["finished_later"]), (&json!(true), &json!(true)), "{finished}");
    assert_eq!(machine.console.times("."), passes);
    wait_until("the VM's end", || !is_there(u64::from(machine.process.pid().unwrap())));
    let awake = wake(&scene, "later", "elsewhere", &[]);
    awake.console.wait_for(".", 1);
    awake.console.assert_no_wrong_page();
    awake.end();
}

#[test]
fn a_guest_whose_snapshot_turns_out_not_to_be_durable_is_put_on_standby_when_asked_again() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    store.hold(Hold::AwayBeforeItIsDone);
    let failure = error(&mut standby(&scene, &store, "later", &[]));
    assert!(!scene.path("store/plain/refs/later").exists());
    // Nobody can tell that from the other case.
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Paused", "{failure}");
    store.come_back();
    let done = document(&standby(&scene, &store, "later", &["--keep-running"]).output().unwrap());
    assert_eq!((&done["ended"], &done["finished_later"]), (&json!(false), &Value::Null), "{done}");
    machine.console.goes_on(1);
}

#[test]
fn a_daemon_finishes_a_standby_in_doubt_as_soon_as_its_store_is_back() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let daemon = start(&scene, &store);
    let (vm, console) = daemon.wake(&scene, "one", json!({}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    store.hold(Hold::ThenAway);
    let (status, code) = daemon.refused("POST", "/v1/vms/one/standby", &json!({"name": "later"}));
    assert_eq!((status, code.as_str()), (503, "unavailable"));
    assert_eq!(state(&vm), "Paused");
    let passes = console.times(".");
    store.come_back();
    wait_until("the VM's end", || daemon.get("/v1/vms/one")["state"] == "ended");
    assert_eq!(console.times("."), passes, "it did not run again");
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    assert_eq!((&standby["ended"], &standby["finished_later"]), (&json!(true), &json!(true)), "{standby}");
}

/// The write that was on its way landed after the next had looked, and the guest ran on all the same.
#[test]
fn a_reference_write_that_is_late_lands_nowhere() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::UntilItIsLate);
    let _end = Mortal::of(&vm);
    let passes = console.times(".");
    let daemon = start(&scene, &store);
    console.wait_for(".", passes + 2);
    assert_eq!(store.land(), "412 Precondition Failed");
    assert_eq!(error(&mut scene.dormouse("home", &["show", "later"]))["kind"], "no_such_snapshot");
    assert_eq!(daemon.get("/v1/vms/one")["state"], "running");
    console.assert_no_wrong_page();
}

/// Another host had woken the snapshot, and removed it or put it to sleep again: the guest ran on here.
fn stands_still_once_others(others: &[&str]) {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::BeforeItIsAnswered);
    let _end = Mortal::of(&vm);
    let passes = console.times(".");
    let mut elsewhere = scene.dormouse("elsewhere", others);
    use_store(&mut elsewhere, &store.address);
    let done = elsewhere.output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let daemon = start(&scene, &store);
    let told = |line: &Value| line.to_string().contains("is left to you");
    wait_until("a word on it", || daemon.logged().iter().any(told));
    assert_eq!((state(&vm), console.times(".")), (json!("Paused"), passes));
}

#[test]
fn a_guest_whose_snapshot_others_removed_stands_still() {
    stands_still_once_others(&["rm", "later"]);
}

#[test]
fn a_guest_whose_name_others_moved_stands_still() {
    stands_still_once_others(&["import", "later", "--replace", "--disk", "d=guest.elf"]);
}

/// It woke, on its own host and on others, beside a guest that is newer.
#[test]
fn a_name_whose_newer_guest_waits_is_woken_nowhere() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    document(&standby(&scene, &store, "later", &["--keep-running"]).output().unwrap());
    machine.console.goes_on(1);
    store.hold(Hold::BeforeItIsDone);
    let replacing = Running::start(standby(&scene, &store, "later", &["--replace"]));
    store.wait_held();
    let refused = |host: &str| {
        let arguments = ["resume", "firecracker", "--no-daemon", "later", "--firecracker", scene.binary()];
        let mut resume = scene.dormouse(host, &arguments);
        use_store(&mut resume, &store.address);
        let failure = error(&mut resume);
        assert_eq!((&failure["kind"], &failure["retryable"]), (&json!("busy"), &json!(true)), "{failure}");
        assert!(failure["message"].as_str().unwrap().contains("is newer than later"), "{failure}");
    };
    refused("home");
    refused("elsewhere");
    replacing.kill();
    refused("home");
    refused("elsewhere");
    let done = document(&standby(&scene, &store, "later", &["--replace"]).output().unwrap());
    assert_eq!(done["ended"], true, "{done}");
    let awake = wake(&scene, "later", "home", &[]);
    awake.console.wait_for(".", 1);
    awake.console.assert_no_wrong_page();
    awake.end();
}
