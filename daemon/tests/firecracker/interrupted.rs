//! Whoever puts a VM on standby is killed at the instants that matter: at no time are there two of one machine awake.

use std::time::Duration;

use serde_json::{Value, json};

use crate::held_store::{HeldStore, Hold};
use crate::scene::{Console, PATIENCE, Running, Scene, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, Served, is_there, request};
use crate::slow_s3::use_store;
use crate::two_standbys::standby;

pub(crate) fn start(scene: &Scene, store: &HeldStore) -> Served {
    Served::start_with(scene, &[], |command| use_store(command, &store.address))
}

pub(crate) fn api(vm: &Value) -> dormouse_firecracker::ApiClient {
    let socket = vm["api_socket"].as_str().unwrap();
    dormouse_firecracker::ApiClient::new(socket.as_ref(), PATIENCE)
}

pub(crate) fn state(vm: &Value) -> Value {
    api(vm).get("/").unwrap()["state"].clone()
}

/// Begins to put `one` on standby as `later`, and kills the daemon when the write of the reference is held back.
pub(crate) fn kill_in_standby(scene: &Scene, store: &HeldStore, hold: Hold) -> (Value, Console) {
    let daemon = start(scene, store);
    let (vm, console) = daemon.wake(scene, "one", json!({"prefetch": false}));
    console.wait_for(".", 1);
    store.hold(hold);
    let mut client = daemon.connect();
    let body = json!({"name": "later"});
    std::io::Write::write_all(&mut client, &request("POST", "/v1/vms/one/standby", Some(&body))).unwrap();
    store.wait_held();
    assert_eq!(state(&vm), "Paused");
    daemon.process.kill();
    (vm, console)
}

#[test]
fn a_daemon_killed_once_the_snapshot_is_durable_is_followed_by_one_that_ends_the_vm() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::BeforeItIsAnswered);
    let _end = Mortal::of(&vm);
    let passes = console.times(".");
    let daemon = start(&scene, &store);
    wait_until("the VM's end", || daemon.get("/v1/vms/one")["state"] == "ended");
    assert!(!is_there(vm["pid"].as_u64().unwrap()));
    assert_eq!(console.times("."), passes, "it did not run again");
    assert_eq!(daemon.metric("dormouse_vms_ended_total{how=\"standby\"}"), 1.0);
    // Asked again, it is answered as the first would have been.
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    let answered = (&standby["ended"], &standby["finished_later"], &standby["kind"]);
    assert_eq!(answered, (&json!(true), &json!(true), &json!("diff")), "{standby}");
    assert_eq!(standby["snapshot"], daemon.get("/v1/snapshots/later")["snapshot"]);
    assert_eq!(daemon.get("/v1/vms/one")["standby"], standby);
    let (vm, console) = daemon.wake(&scene, "two", json!({"snapshot": "later"}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    console.assert_no_wrong_page();
}

#[test]
fn a_daemon_killed_before_the_snapshot_is_durable_is_followed_by_one_that_lets_the_vm_go_on() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::BeforeItIsDone);
    let _end = Mortal::of(&vm);
    let passes = console.times(".");
    let daemon = start(&scene, &store);
    console.wait_for(".", passes + 2);
    assert_eq!(daemon.get("/v1/vms/one")["state"], "running");
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    assert_eq!((&standby["ended"], &standby["finished_later"]), (&json!(true), &Value::Null), "{standby}");
    console.assert_no_wrong_page();
}

#[test]
fn a_guest_that_somebody_let_run_on_after_it_was_stored_is_not_ended() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::BeforeItIsAnswered);
    let _end = Mortal::of(&vm);
    // It runs for a moment, perhaps not even until it wants a page, and stands still again.
    api(&vm).resume().unwrap();
    api(&vm).pause().unwrap();
    let daemon = start(&scene, &store);
    wait_until("the VM", || daemon.get("/v1/vms/one")["state"] == "running");
    wait_until("a word on it", || {
        daemon.logged().iter().any(|l| l.to_string().contains("end one of the two"))
    });
    assert_eq!(state(&vm), "Paused", "nobody lets it run either");
    api(&vm).resume().unwrap();
    console.goes_on(1);
    console.assert_no_wrong_page();
}

#[test]
fn a_standby_killed_once_its_snapshot_is_durable_is_finished_by_the_next() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let standby = |name: &str| standby(&scene, &store, name, &[]);
    store.hold(Hold::BeforeItIsAnswered);
    let first = Running::start(standby("later"));
    store.wait_held();
    // While the first lives, it is its business.
    let busy = standby("other").output().unwrap();
    assert!(String::from_utf8_lossy(&busy.stdout).contains("\"busy\""), "{busy:?}");
    first.kill();
    let passes = machine.console.times(".");
    let finished = crate::scene::document(&standby("later").output().unwrap());
    assert_eq!((&finished["ended"], &finished["finished_later"]), (&json!(true), &json!(true)), "{finished}");
    assert_eq!(machine.console.times("."), passes);
    wait_until("the VM's end", || !is_there(u64::from(machine.process.pid().unwrap())));
    let left = std::fs::read_dir(scene.path("run/dormouse")).unwrap().flatten();
    let left: Vec<_> =
        left.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains("standby")).collect();
    assert!(left.is_empty(), "{left:?}");
    scene.done("home", &["verify", "later"]);
}

#[test]
fn what_was_touched_before_and_after_a_kill_is_in_the_next_stream() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    // A first pass takes so long that the daemon can be killed in its midst.
    let store = HeldStore::start(scene.path("store"), Duration::from_millis(15));
    let daemon = start(&scene, &store);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false, "record_window_s": 60}));
    let _end = Mortal::of(&vm);
    let note = || {
        let notes = std::fs::read_dir(scene.path("run/dormouse")).unwrap().flatten().map(|f| f.path());
        let note = notes.into_iter().find(|path| path.extension().is_some_and(|e| e == "session"))?;
        serde_json::from_slice::<Value>(&std::fs::read(note).ok()?).ok()
    };
    let missed = |note: &Value| -> u64 {
        let runs = note["session"]["missed"].as_array().unwrap();
        runs.iter().map(|run| run[1].as_u64().unwrap()).sum()
    };
    wait_until("a note", || note().is_some_and(|n| missed(&n) > 0));
    daemon.process.kill();
    let before = note().unwrap();
    assert!(missed(&before) < crate::scene::PAGES, "all was touched before the kill: {}", missed(&before));
    let daemon = start(&scene, &store);
    console.wait_for(".", 2);
    wait_until("a note of all", || note().is_some_and(|n| missed(&n) >= crate::scene::PAGES - 64));
    let after = note().unwrap();
    assert_eq!((&before["complete"], &after["complete"]), (&json!(true), &json!(false)));
    assert!(after["recorded_ms"].as_u64() >= before["recorded_ms"].as_u64(), "{after}");
    // In the order of first touch.
    let first = |note: &Value| note["session"]["missed"][0].clone();
    assert_eq!(first(&after), first(&before));
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    let pages = standby["stream"]["pages"].as_u64().unwrap();
    assert!(pages >= crate::scene::PAGES, "{standby}");
    console.assert_no_wrong_page();
}
