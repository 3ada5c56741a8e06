//! VMs of the daemon: woken, put on standby, detached, ended, over the socket and by the command line.

use std::io::Write as _;

use serde_json::{Value, json};

use crate::scene::{PAGES, PATIENCE, Running, Scene, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, Served, is_there, kill, request, served};

fn phases(vm: &Value) -> Vec<&str> {
    vm["resume"]["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect()
}

#[test]
fn a_vm_wakes_sleeps_and_wakes_again_and_is_counted() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    assert_eq!((&vm["state"], &vm["origin"]["kind"]), (&json!("running"), &json!("started")), "{vm}");
    for phase in ["open", "spawn", "handshake", "load", "resume"] {
        assert!(phases(&vm).contains(&phase), "{phase} is not in {vm}");
    }
    console.wait_for(".", 2);
    // The same request again wakes no second one; another under the same id is refused.
    let (again, _) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    assert_eq!(again["pid"], vm["pid"]);
    let other = json!({"id": "one", "snapshot": "vm", "firecracker": scene.binary()});
    assert_eq!(daemon.refused("POST", "/v1/vms", &other), (409, "exists".into()));
    assert_eq!(daemon.get("/v1/vms")["vms"].as_array().unwrap().len(), 1);
    assert_eq!(daemon.metric("dormouse_vms{state=\"running\"}"), 1.0);
    assert_eq!(daemon.metric("dormouse_resumes_total{result=\"ok\"}"), 1.0);
    assert_eq!(daemon.metric("dormouse_resume_phase_seconds_count{phase=\"load\"}"), 1.0);
    assert!(daemon.metric("dormouse_faults_total") > 0.0);
    assert!(daemon.metric("dormouse_fault_latency_seconds_count") > 0.0);

    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    assert_eq!(
        (&standby["kind"], &standby["parent"], &standby["ended"]),
        (&json!("diff"), &json!("vm"), &json!(true))
    );
    let ended = daemon.get("/v1/vms/one?wait_s=60");
    assert_eq!((&ended["state"], &ended["standby"]), (&json!("ended"), &standby), "{ended}");
    assert_eq!(ended["report"]["failures"], json!([]), "{ended}");
    // Its answer may have been lost: asked again, by either way, it is the same answer.
    assert_eq!(daemon.post("/v1/vms/one/standby", &json!({"name": "later"})), standby);
    let found = json!({"name": "later", "api_socket": vm["api_socket"]});
    assert_eq!(daemon.post("/v1/standby", &found), standby);
    let other = daemon.refused("POST", "/v1/vms/one/standby", &json!({"name": "other"}));
    assert_eq!(other, (409, "not_served".into()));
    assert_eq!(daemon.metric("dormouse_standbys_total{result=\"ok\"}"), 1.0);
    assert_eq!(daemon.metric("dormouse_standby_pause_seconds_count"), 1.0);
    assert_eq!(daemon.metric("dormouse_vms_ended_total{how=\"standby\"}"), 1.0);
    // What it did is still counted.
    let installed = |source| daemon.metric(&format!("dormouse_pages_installed_total{{source=\"{source}\"}}"));
    assert!(installed("demand") + installed("prefetch") >= PAGES as f64);
    assert!(!is_there(vm["pid"].as_u64().unwrap()));
    assert!(!std::path::Path::new(vm["api_socket"].as_str().unwrap()).exists());

    let (vm, console) = daemon.wake(&scene, "two", json!({"snapshot": "later", "prefetch": false}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    let stopped = daemon.post("/v1/vms/two/stop", &json!({}));
    assert_eq!(stopped["state"], "ended", "{stopped}");
    assert_eq!(daemon.post("/v1/vms/two/stop", &json!({}))["state"], "ended");
    console.assert_no_wrong_page();
    let of_two = |l: &Value| l["spans"].as_array().is_some_and(|s| s.iter().any(|s| s["id"] == "two"));
    assert!(daemon.logged().iter().any(of_two), "what is logged of a VM carries its id");
}

#[test]
fn a_client_that_hangs_up_in_the_middle_leaves_a_whole_vm() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let console = scene.path("one.console");
    let body = json!({"id": "one", "snapshot": "vm", "firecracker": scene.binary(), "console": console});
    let mut client = daemon.connect();
    client.write_all(&request("POST", "/v1/vms", Some(&body))).unwrap();
    wait_until("the request to be begun", || daemon.get("/v1/vms")["vms"][0]["id"] == "one");
    drop(client);
    wait_until("the VM", || daemon.get("/v1/vms")["vms"][0]["state"] == "running");
    let (vm, console) = daemon.wake(&scene, "one", json!({}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    let sleep = request("POST", "/v1/vms/one/standby", Some(&json!({"name": "later"})));
    let mut client = daemon.connect();
    client.write_all(&sleep).unwrap();
    wait_until("standby to be begun", || {
        let vm = daemon.get("/v1/vms/one");
        vm["operation"] == "standby" || vm["state"] == "ended"
    });
    drop(client);
    wait_until("standby", || daemon.get("/v1/vms/one")["state"] == "ended");
    assert_eq!(daemon.post("/v1/vms/one/standby", &json!({"name": "later"}))["name"], "later");
    assert_eq!(daemon.metric("dormouse_resumes_total{result=\"ok\"}"), 1.0);
    assert_eq!(daemon.metric("dormouse_standbys_total{result=\"ok\"}"), 1.0);
    scene.done("host", &["verify", "later"]);
}

#[test]
fn a_firecracker_from_a_pool_takes_a_snapshot() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    // Started before anybody wanted a VM, by somebody else.
    let pool = ["pool-a", "pool-b"].map(|name| scene.start(name));
    for (machine, name) in pool.iter().zip(["pool-a", "pool-b"]) {
        let request =
            json!({"id": name, "snapshot": "vm", "api_socket": scene.text(&format!("{name}.sock"))});
        let vm = daemon.post("/v1/vms", &request);
        assert_eq!(vm["pid"].as_u64(), machine.process.pid().map(u64::from));
        assert_eq!(vm["origin"]["kind"], "pool", "{vm}");
        machine.console.wait_for(".", 1);
    }
    // One that has a guest already is not given another, and its guest is not killed for that.
    let taken = json!({"id": "again", "snapshot": "vm", "api_socket": scene.text("pool-a.sock")});
    assert_eq!(daemon.refused("POST", "/v1/vms", &taken).1, "vmm");
    for machine in &pool {
        machine.console.goes_on(1);
        machine.console.assert_no_wrong_page();
    }
    let standby = daemon.post("/v1/vms/pool-a/standby", &json!({"name": "from-pool"}));
    assert_eq!(standby["kind"], "diff", "{standby}");
}

#[test]
fn a_detached_vm_needs_the_daemon_no_more() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    let detached = scene.done("host", &["detach", "one"]);
    assert_eq!(detached["state"], "detached", "{detached}");
    assert_eq!(daemon.post("/v1/vms/one/detach", &json!({}))["state"], "detached");
    daemon.process.kill();
    std::fs::rename(scene.path("store"), scene.path("away")).unwrap();
    console.goes_on(2);
    console.assert_no_wrong_page();
}

#[test]
fn a_listener_serves_clones_and_they_outlive_it() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let socket = scene.text("uffd.sock");
    let listen = json!({"snapshot": "vm", "socket": socket});
    let listener = daemon.post("/v1/listeners", &listen);
    assert_eq!(daemon.post("/v1/listeners", &listen)["id"], listener["id"], "the same request again");
    drop(crate::scene::say(socket.as_ref(), b"nonsense"));
    let clones = ["one", "two"].map(|name| {
        let machine = scene.start(name);
        let api = machine.process.api(PATIENCE);
        api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
        machine
    });
    let path = format!("/v1/listeners/{}", listener["id"].as_str().unwrap());
    wait_until("both to be counted", || {
        daemon.get(&path)["served"] == 2 && daemon.get(&path)["refused"] == 1
    });
    assert_eq!(daemon.ask("DELETE", &path, None).0, 200);
    assert_eq!(daemon.ask("GET", &path, None).0, 404);
    wait_until("the socket to go", || !scene.path("uffd.sock").exists());
    for clone in &clones {
        clone.console.goes_on(2);
        clone.console.assert_no_wrong_page();
    }
    let vms = daemon.get("/v1/vms");
    let of = |vm: &Value| vm["origin"]["listener"] == listener["id"] && vm["state"] == "running";
    assert_eq!(vms["vms"].as_array().unwrap().iter().filter(|vm| of(vm)).count(), 2, "{vms}");
    drop(clones);
    wait_until("their end", || daemon.metric("dormouse_vms_ended_total{how=\"ended\"}") == 2.0);
}

/// What both ways print, as far as it is the same at any time.
fn shape(document: &Value) -> Vec<String> {
    document.as_object().unwrap().keys().filter(|k| *k != "full_because").cloned().collect()
}

#[test]
fn the_command_line_asks_the_daemon_and_prints_what_it_would_print_alone() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let socket = scene.text("boot.sock");
    let arguments = ["standby", "firecracker", "--api-socket", &socket, "--keep-running"];
    let alone = scene.done("host", &[&arguments[..], &["alone"]].concat());
    let daemon = crate::served::Served::start(&scene, &[]);
    // A VM it has never heard of.
    let asked = scene.done("host", &[&arguments[..], &["vm"]].concat());
    assert_eq!(shape(&alone), shape(&asked));
    assert_eq!(asked["kind"], "diff", "what was remembered alone is known to the daemon: {asked}");
    assert_eq!(daemon.metric("dormouse_standbys_total{result=\"ok\"}"), 1.0);
    // A name that has another snapshot is refused in the same way.
    let taken = scene.dormouse("host", &[&arguments[..], &["alone"]].concat()).output().unwrap();
    assert_eq!(taken.status.code(), Some(1));
    scene.done("host", &[&arguments[..], &["--no-daemon", "third"]].concat());
    assert_eq!(daemon.metric("dormouse_standbys_total{result=\"ok\"}"), 1.0);
    machine.process.kill().unwrap();

    let console = scene.text("woken.console");
    let resume = ["resume", "firecracker", "vm", "--firecracker", scene.binary(), "--console", &console];
    let woken = scene.done("host", &resume);
    let _end = Mortal::of(&woken);
    let console = crate::scene::Console(console.into());
    console.wait_for(".", 2);
    console.assert_no_wrong_page();
    let vms = scene.done("host", &["ps"]);
    let vm = vms["vms"].as_array().unwrap().iter().find(|vm| vm["pid"] == woken["pid"]).unwrap();
    assert_eq!(vm["resume"], woken);
    let stopped = scene.done("host", &["stop", vm["id"].as_str().unwrap()]);
    assert_eq!(stopped["state"], "ended", "{stopped}");
    // Who wants a report waits for it.
    let report = scene.text("report");
    let resume = ["resume", "firecracker", "vm", "--firecracker", scene.binary(), "--report", &report];
    let waiting = Running::start(scene.dormouse("host", &resume));
    let running = || {
        let vms = daemon.get("/v1/vms");
        // It runs a moment before its resume is over, until when nothing else can be asked of it.
        let over = |vm: &&Value| vm["state"] == "running" && vm["operation"].is_null();
        vms["vms"].as_array().unwrap().iter().find(over).cloned()
    };
    wait_until("it to run", || running().is_some());
    let reported = running().unwrap();
    scene.done("host", &["stop", reported["id"].as_str().unwrap()]);
    waiting.done();
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["pid"], &report["failures"]), (&reported["pid"], &json!([])), "{report}");
    // Another store's work is not the daemon's.
    let elsewhere = scene.text("elsewhere");
    let other = scene.dormouse("host", &["ps", "--store", &elsewhere]).output().unwrap();
    let said: Value = serde_json::from_slice(&other.stdout).unwrap();
    assert_eq!(said["error"]["kind"], "other_daemon", "{said}");
    daemon.process.kill();
    let none = scene.dormouse("host", &["ps"]).output().unwrap();
    let said: Value = serde_json::from_slice(&none.stdout).unwrap();
    assert_eq!(said["error"]["kind"], "no_daemon", "{said}");
}

/// A woken VM whose pages are not all there, under a daemon that is asked to end.
fn stopping(scene: &Scene, policy: &str) -> (crate::served::Served, Value, crate::scene::Console) {
    let mut daemon = served(scene, &["--on-stop", policy]);
    let (vm, console) = daemon.wake(scene, "one", json!({"prefetch": false}));
    daemon.terminate();
    (daemon, vm, console)
}

#[test]
fn a_daemon_that_is_ended_detaches_its_vms() {
    let Some(scene) = scene() else { return };
    let (daemon, vm, console) = stopping(&scene, "detach");
    let _end = Mortal::of(&vm);
    daemon.process.done();
    std::fs::rename(scene.path("store"), scene.path("away")).unwrap();
    console.goes_on(2);
    console.assert_no_wrong_page();
}

/// Stores `vm` anew with frames of their own at the end of its memory, where its guest has nothing: however fast it is,
/// something is left to be brought.
fn add_what_no_guest_touches(scene: &Scene) {
    let (memory, vmstate) = (scene.text("memory"), format!("vmstate={}", scene.text("vmstate")));
    scene.done("home", &["export", "vm", "--memory", &memory]);
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    let end = file.metadata().unwrap().len();
    let pages: Vec<u8> = (1..=96u8).flat_map(|page| [page; 4096]).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &pages, end - pages.len() as u64).unwrap();
    scene.done("home", &["import", "vm", "--replace", "--memory", &memory, "--state", &vmstate]);
    std::fs::remove_file(memory).unwrap();
}

#[test]
fn a_daemon_whose_store_is_away_does_not_leave_its_vms() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    add_what_no_guest_touches(&scene);
    let mut daemon = Served::start(&scene, &["--on-stop", "detach"]);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    std::fs::rename(scene.path("store"), scene.path("away")).unwrap();
    daemon.terminate();
    wait_until("it to be stopping", || daemon.get("/v1/health")["status"] == "stopping");
    let refused = daemon.refused("POST", "/v1/vms", &json!({"snapshot": "vm", "firecracker": "/bin/false"}));
    assert_eq!(refused, (503, "stopping".into()));
    assert!(daemon.process.child().try_wait().unwrap().is_none());
    std::fs::rename(scene.path("away"), scene.path("store")).unwrap();
    daemon.process.done();
    console.goes_on(2);
    console.assert_no_wrong_page();
}

#[test]
fn a_daemon_may_wait_for_its_vms_to_end() {
    let Some(scene) = scene() else { return };
    let (mut daemon, vm, console) = stopping(&scene, "wait");
    let end = Mortal::of(&vm);
    wait_until("it to be stopping", || daemon.get("/v1/health")["status"] == "stopping");
    console.wait_for(".", 2);
    assert!(daemon.process.child().try_wait().unwrap().is_none());
    kill("-9", end.0);
    daemon.process.done();
    console.assert_no_wrong_page();
}
