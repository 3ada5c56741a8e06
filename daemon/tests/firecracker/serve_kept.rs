//! The daemon is killed, and the next one takes its VMs up again.

use std::io::Write as _;
use std::time::Duration;

use serde_json::json;

use crate::scene::{PATIENCE, Scene, scene, wait_until};
use crate::served::{Mortal, Served, is_there, request, served};

/// Kills of the daemon while its guest waits for pages.
const KILLS: u64 = 6;

/// The state of the VM `id`, until it is what is waited for.
fn wait_for_state(daemon: &Served, id: &str, state: &str) {
    wait_until(state, || daemon.get(&format!("/v1/vms/{id}"))["state"] == state);
}

#[test]
fn a_killed_daemons_vms_are_taken_up_again_by_the_next() {
    let Some(scene) = scene() else { return };
    let mut daemon = served(&scene, &[]);
    assert_eq!(daemon.get("/v1/health")["keeps_vms"], true);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    for kill in 0..KILLS {
        // Now in the middle of a pass, now at once.
        std::thread::sleep(Duration::from_millis(kill % 3 * 7));
        daemon.process.kill();
        daemon = Served::start(&scene, &[]);
        wait_for_state(&daemon, "one", "running");
        let again = daemon.get("/v1/vms/one");
        assert_eq!((&again["pid"], &again["origin"]["kind"]), (&vm["pid"], &json!("kept")), "{again}");
    }
    console.goes_on(2);
    // The request that woke it, repeated to another daemon, still wakes no second one.
    let (again, _) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    assert_eq!(again["pid"], vm["pid"]);
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    assert_eq!((&standby["kind"], &standby["parent"]), (&json!("diff"), &json!("vm")), "{standby}");
    wait_for_state(&daemon, "one", "ended");
    console.assert_no_wrong_page();
    let left = std::fs::read_dir(scene.path("run/dormouse")).unwrap().flatten();
    let left = left.filter(|e| e.file_name().to_string_lossy().starts_with("vms-"));
    assert_eq!(left.flat_map(|e| std::fs::read_dir(e.path()).unwrap()).count(), 0, "its directory stays");

    let (vm, console) = daemon.wake(&scene, "two", json!({"snapshot": "later"}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 2);
    console.assert_no_wrong_page();
}

#[test]
fn a_daemon_that_is_ended_leaves_its_vms_to_the_next() {
    let Some(scene) = scene() else { return };
    let mut daemon = served(&scene, &[]);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    let socket = scene.text("uffd.sock");
    daemon.post("/v1/listeners", &json!({"snapshot": "vm", "socket": socket, "prefetch": false}));
    let clone = scene.start("clone");
    let api = clone.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
    // Whoever waits for a VM's end does not hold up the daemon's.
    let mut waiting = daemon.connect();
    waiting.write_all(&request("GET", "/v1/vms/one?wait_s=600", None)).unwrap();
    daemon.terminate();
    daemon.process.done();
    let daemon = Served::start(&scene, &[]);
    for console in [&console, &clone.console] {
        console.goes_on(2);
        console.assert_no_wrong_page();
    }
    assert_eq!(daemon.get("/v1/health")["vms"], 2);
}

#[test]
fn vms_whose_store_is_away_when_the_daemon_starts_wait_for_it() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    daemon.process.kill();
    std::fs::rename(scene.path("store"), scene.path("away")).unwrap();
    let daemon = Served::start(&scene, &[]);
    assert_eq!(daemon.get("/v1/vms/one")["state"], "starting");
    let (status, code) = daemon.refused("POST", "/v1/vms", &vm_request(&scene, "one"));
    assert_eq!((status, code.as_str()), (409, "busy"));
    assert!(!scene.path("store").exists(), "a daemon that reads makes no store");
    std::fs::rename(scene.path("away"), scene.path("store")).unwrap();
    wait_for_state(&daemon, "one", "running");
    console.goes_on(2);
    console.assert_no_wrong_page();
}

/// What [`Served::wake`] asks for.
fn vm_request(scene: &Scene, id: &str) -> serde_json::Value {
    let console = scene.path(&format!("{id}.console"));
    json!({"id": id, "snapshot": "vm", "firecracker": scene.binary(), "console": console, "prefetch": false})
}

#[test]
fn a_daemon_killed_while_it_wakes_a_vm_leaves_none_half_awake() {
    let Some(scene) = scene() else { return };
    let mut daemon = served(&scene, &[]);
    for delay_ms in [0, 5, 15, 30, 60] {
        let id = format!("after-{delay_ms}");
        let body = vm_request(&scene, &id);
        let mut client = daemon.connect();
        client.write_all(&request("POST", "/v1/vms", Some(&body))).unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        daemon.process.kill();
        daemon = Served::start(&scene, &[]);
        wait_until("what is left of it to be dealt with", || {
            let vms = daemon.get("/v1/vms");
            vms["vms"].as_array().unwrap().iter().all(|vm| vm["state"] != "starting")
        });
        // Asked again, there is one in any case, and it is right.
        let (vm, console) =
            match daemon.get("/v1/vms")["vms"].as_array().unwrap().iter().find(|v| v["id"] == *id) {
                // It had come to its end before.
                Some(left) if left["state"] == "ended" => {
                    daemon.wake(&scene, &format!("{id}-again"), json!({}))
                }
                _ => daemon.wake(&scene, &id, json!({"prefetch": false})),
            };
        let end = Mortal::of(&vm);
        console.goes_on(1);
        console.assert_no_wrong_page();
        let others = std::process::Command::new("pgrep").args(["-f", &scene.text("run")]).output().unwrap();
        let others = String::from_utf8_lossy(&others.stdout).into_owned();
        let firecrackers = others.lines().filter_map(|pid| pid.parse::<u64>().ok()).filter(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim() == "firecracker" && is_there(*pid) && *pid != end.0
        });
        assert_eq!(
            firecrackers.collect::<Vec<_>>(),
            Vec::<u64>::new(),
            "a Firecracker nobody knows of is left"
        );
        daemon.post(&format!("/v1/vms/{}/stop", vm["id"].as_str().unwrap()), &json!({}));
    }
}
