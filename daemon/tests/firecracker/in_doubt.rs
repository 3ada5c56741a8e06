//! The write of a reference whose answer is lost, and a store that stays away: as long as nobody can tell whether the
//! snapshot is durable, its guest stands still.

use std::time::Duration;

use serde_json::{Value, json};

use crate::generations::wake;
use crate::held_store::{HeldStore, Hold};
use crate::interrupted::{start, state};
use crate::scene::{PATIENCE, document, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, is_there};
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
