//! Standbys that are cut off before anything is durable: their guests run on, whoever comes next and whatever becomes of
//! that.

use std::fs;
use std::io::{Read as _, Write as _};
use std::time::Duration;

use serde_json::{Value, json};

use crate::held_store::{HeldStore, Hold};
use crate::interrupted::{kill_in_standby, start, state};
use crate::scene::{Machine, PATIENCE, Running, Scene, document, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, Served, is_there, kill, request, served};
use crate::slow_s3::use_store;
use crate::two_standbys::standby;

/// A guest that a standby as `later` left paused, as that was killed; nothing is durable.
fn left_paused(scene: &Scene, machine: &Machine, store: &HeldStore) {
    store.hold(Hold::BeforeItIsDone);
    let first = Running::start(standby(scene, store, "later", &[]));
    store.wait_held();
    first.kill();
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Paused");
}

/// It was forgotten that the guest had run, so it was left paused by a standby that said it runs on.
#[test]
fn a_guest_that_a_killed_standby_left_paused_runs_on_when_the_next_fails_or_keeps_it_running() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);

    left_paused(&scene, &machine, &store);
    // Where packs should be written there is a file.
    let (packs, aside) = (scene.path("store/plain/packs"), scene.path("store/plain/aside"));
    fs::rename(&packs, &aside).unwrap();
    fs::write(&packs, "in the way").unwrap();
    let socket = scene.text("boot.sock");
    let local = ["standby", "firecracker", "--no-daemon", "--api-socket", &socket, "later"];
    let output = scene.dormouse("home", &local).output().unwrap();
    let answer = serde_json::from_slice::<Value>(&output.stdout).unwrap();
    let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{answer}"));
    assert!(message.contains("nothing was stored and the VM runs on"), "{message}");
    machine.console.goes_on(1);
    fs::remove_file(&packs).unwrap();
    fs::rename(&aside, &packs).unwrap();

    left_paused(&scene, &machine, &store);
    let kept = document(&standby(&scene, &store, "later", &["--keep-running"]).output().unwrap());
    assert_eq!(kept["ended"], false, "{kept}");
    machine.console.goes_on(1);

    // What is refused leaves it no worse.
    left_paused(&scene, &machine, &store);
    let refused = standby(&scene, &store, "later", &["--parent", "nobody"]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stdout).contains("no_such_snapshot"), "{refused:?}");
    machine.console.goes_on(1);
    machine.console.assert_no_wrong_page();
}

/// It was tried once, for ten seconds, before the daemon was ready.
#[test]
fn a_guest_whose_firecracker_is_slow_to_answer_the_next_daemon_runs_on_in_the_end() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (vm, console) = kill_in_standby(&scene, &store, Hold::BeforeItIsDone);
    let end = Mortal::of(&vm);
    kill("-STOP", end.0);
    let daemon = start(&scene, &store);
    let tried = || daemon.logged().iter().any(|line| line.to_string().contains("may stand still"));
    assert!(!tried(), "it was ready only after it had been waited for");
    wait_until("a try in vain", tried);
    let passes = console.times(".");
    kill("-CONT", end.0);
    console.wait_for(".", passes + 2);
    assert_eq!(daemon.get("/v1/vms/one")["state"], "running");
    console.assert_no_wrong_page();
}

/// Its guest was left paused by a process that had ended well.
#[test]
fn a_standby_whose_request_comes_to_its_end_while_the_daemon_stops_is_not_begun() {
    let Some(scene) = scene() else { return };
    let mut daemon: Served = served(&scene, &[]);
    let (vm, console) = daemon.wake(&scene, "one", json!({}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    let body = json!({"name": "later"}).to_string();
    let mut client = daemon.connect();
    let head = format!(
        "POST /v1/vms/one/standby HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes()).unwrap();
    // Its body is waited for.
    let mut told = [0; b"HTTP/1.1 100 Continue\r\n\r\n".len()];
    client.read_exact(&mut told).unwrap();
    let (first, rest) = body.split_at(body.len() / 2);
    client.write_all(first.as_bytes()).unwrap();
    daemon.terminate();
    wait_until("the control socket to be closed", || !daemon.control.exists());
    client.write_all(rest.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"stopping\""), "{answer}");
    daemon.process.done();
    assert_eq!(state(&vm), "Running");
    assert!(!scene.path("store/plain/refs/later").exists());
    console.assert_no_wrong_page();
}

/// It was not waited for, as it was begun after the daemon had looked for what was under way.
#[test]
fn a_standby_that_is_begun_while_the_daemon_waits_for_a_vm_is_done_before_it_ends() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let mut daemon = Served::start_with(&scene, &["--on-stop", "wait"], |c| use_store(c, &store.address));
    let (waited, _) = daemon.wake(&scene, "one", json!({}));
    let (vm, console) = daemon.wake(&scene, "two", json!({}));
    let _ends = [Mortal::of(&waited), Mortal::of(&vm)];
    console.wait_for(".", 1);
    daemon.post("/v1/vms/two/detach", &json!({}));
    daemon.terminate();
    wait_until("the daemon to stop", || daemon.get("/v1/health")["status"] == "stopping");
    let release = store.hold_reading("vm");
    let mut client = daemon.connect();
    let body = json!({"name": "later"});
    client.write_all(&request("POST", "/v1/vms/two/standby", Some(&body))).unwrap();
    store.wait_held();
    kill("-9", waited["pid"].as_u64().unwrap());
    wait_until("the VM's end", || daemon.get("/v1/vms/one")["state"] == "ended");
    // Otherwise it would end by now: nothing it served is left, and what is being answered it does not wait for.
    wait_until("the standby to be waited for", || {
        daemon.logged().iter().any(|line| line.to_string().contains("was begun meanwhile"))
    });
    drop(release);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"ended\":true"), "{answer}");
    daemon.process.done();
    wait_until("the VM's end", || !is_there(vm["pid"].as_u64().unwrap()));
    console.assert_no_wrong_page();
}

/// It panicked when it let go of its store last, whose threads may not be waited for there.
#[test]
fn a_daemon_on_an_object_store_ends_well() {
    let scene = Scene::bare();
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let mut daemon = start(&scene, &store);
    daemon.terminate();
    daemon.process.done();
}
