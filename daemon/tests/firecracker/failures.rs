//! The store goes away, the server goes away: the guest waits or is ended, and is never given a wrong page.

use std::fs;

use serde_json::Value;

use crate::scene::{Machine, PATIENCE, Running, Scene, scene, wait_for_socket, wait_until};
use crate::serve_uffd::parked;

/// A woken guest that has not run yet, whose pages come one by one, and the store renamed away under it.
fn woken_without_store(scene: &Scene, options: &[&str]) -> (Running, Machine) {
    parked(scene);
    let socket = scene.text("uffd.sock");
    let arguments = ["serve-uffd", "vm", "--socket", &socket, "--once", "--no-prefetch", "-vv"];
    let mut command = scene.dormouse("elsewhere", &[&arguments[..], options].concat());
    command.stderr(fs::File::create(scene.path("log")).unwrap());
    let server = Running::start(command);
    wait_for_socket(socket.as_ref());
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, false).unwrap();
    fs::rename(scene.path("store"), scene.path("away")).unwrap();
    api.resume().unwrap();
    wait_until("a page to be asked for again", || {
        fs::read_to_string(scene.path("log")).unwrap().contains("retrying")
    });
    (server, machine)
}

#[test]
fn a_guest_waits_for_a_store_that_comes_back() {
    let Some(scene) = scene() else { return };
    let (server, machine) = woken_without_store(&scene, &[]);
    assert_eq!(machine.console.times("."), 0, "a pass takes pages that nobody has");
    fs::rename(scene.path("away"), scene.path("store")).unwrap();
    machine.console.wait_for(".", 2);
    machine.console.assert_no_wrong_page();
    machine.process.kill().unwrap();
    let output = server.end();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{report}");
    assert!(report["counters"]["retries"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn a_guest_is_killed_for_a_store_that_does_not_come_back_and_told_why() {
    let Some(scene) = scene() else { return };
    let (server, mut machine) = woken_without_store(&scene, &["--give-up-after", "1s"]);
    let output = server.end();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let why = report["killed_because"].as_str().unwrap_or_else(|| panic!("{report}"));
    assert!(why.contains("missing from the store"), "{why}");
    assert!(!report["failures"].as_array().unwrap().is_empty(), "{report}");
    wait_until("Firecracker to be gone", || machine.process.try_wait().unwrap().is_some());
    machine.console.assert_no_wrong_page();
}

#[test]
fn a_vm_that_is_held_stands_still_and_is_not_given_anything() {
    let Some(scene) = scene() else { return };
    let (server, mut machine) = woken_without_store(&scene, &["--give-up-after", "1s", "--policy", "hold"]);
    wait_until("the page to be given up", || {
        fs::read_to_string(scene.path("log")).unwrap().contains("a vCPU waits for a page that cannot be had")
    });
    assert_eq!(machine.process.try_wait().unwrap(), None, "it is there to be looked at");
    machine.process.kill().unwrap();
    let output = server.end();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    // One vCPU waits for one page. Had it got anything, it would have met the next.
    assert_eq!(report["failures"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["counters"]["poisoned"], 0, "{report}");
    assert_eq!(machine.console.times("."), 0);
    machine.console.assert_no_wrong_page();
}

/// Whether the kernel has a vCPU of Firecracker's process stand still in a fault that a userfaultfd is to answer.
fn waits_for_a_page(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let said = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default();
    let vcpus = threads.filter(|thread| said(thread.path().join("comm")).starts_with("fc_vcpu"));
    vcpus.map(|vcpu| said(vcpu.path().join("wchan"))).any(|function| function == "handle_userfault")
}

#[test]
fn a_guest_whose_server_is_killed_gets_no_zeros() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let socket = scene.text("uffd.sock");
    let arguments = ["serve-uffd", "vm", "--socket", &socket, "--once", "--no-prefetch"];
    let server = Running::start(scene.dormouse("elsewhere", &arguments));
    wait_for_socket(socket.as_ref());
    let mut machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, false).unwrap();
    server.kill();
    api.resume().unwrap();
    // It cannot say anything as long as its vCPU waits; a zero page would have it say `X`.
    let pid = machine.process.pid().unwrap();
    wait_until("its vCPU to wait for a page", || waits_for_a_page(pid));
    assert_eq!(machine.process.try_wait().unwrap(), None, "Firecracker holds its memory itself");
    assert_eq!(machine.console.times("."), 0);
    machine.console.assert_no_wrong_page();
}

#[test]
fn a_standby_that_cannot_be_stored_leaves_the_guest_running() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    // Where packs should be written there is a file.
    fs::create_dir_all(scene.path("store/plain")).unwrap();
    fs::write(scene.path("store/plain/packs"), "in the way").unwrap();
    let arguments = ["standby", "firecracker", "--api-socket", &scene.text("boot.sock"), "vm"];
    let output = scene.dormouse("home", &arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = serde_json::from_slice::<Value>(&output.stdout).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("nothing was stored and the VM runs on"), "{message}");
    machine.console.goes_on(1);
    fs::remove_file(scene.path("store/plain/packs")).unwrap();
    // Pages that the failed attempt captured count as dirty no more, so all are captured now.
    let document = scene.done("home", &[&arguments[..], &["--keep-running"]].concat());
    assert_eq!(document["kind"], "full", "{document}");
    machine.console.assert_no_wrong_page();
}

#[test]
fn what_can_be_refused_is_refused_before_the_guest_is_touched() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let empty = scene.start("empty");
    let socket = scene.text("empty.sock");
    for (name, socket, part) in
        [("new", &socket, "only a guest that was started"), ("new", &scene.text("none"), "is it running?")]
    {
        let output = scene
            .dormouse("home", &["standby", "firecracker", "--api-socket", socket, name])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!output.status.success() && text.contains(part), "{text}");
    }
    drop(empty);
    let machine = scene.boot(false);
    let arguments = ["standby", "firecracker", "--api-socket", &scene.text("boot.sock"), "vm"];
    let output = scene.dormouse("home", &arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "the name is taken");
    machine.console.goes_on(1);
    // A resume of what is not there ends the Firecracker it started.
    let arguments = ["resume", "firecracker", "nobody", "--firecracker", scene.binary()];
    let output = scene.dormouse("home", &arguments).output().unwrap();
    let error = serde_json::from_slice::<Value>(&output.stdout).unwrap();
    assert_eq!(error["error"]["kind"], "no_such_snapshot", "{error}");
}
