//! What is not ours, or not ours alone, is left as it is: a Firecracker that another wakes a guest in, a VM that an earlier
//! daemon woke, the answer for another VM, the processes beside a terminal's.

use std::os::unix::process::CommandExt as _;

use serde_json::{Value, json};

use crate::scene::{Console, Running, scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, Served, is_there, kill, served};

/// Times that two are asked for at once.
const ROUNDS: usize = 4;

/// The guest runs, and rightly.
fn goes_on(console: &Console) {
    console.goes_on(2);
    console.assert_no_wrong_page();
}

#[test]
fn two_requests_for_one_firecracker_wake_one_guest_and_leave_it() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    for round in 0..ROUNDS {
        let machine = scene.start(&format!("pool-{round}"));
        // Without an id, as when a request is sent again because its answer was lost.
        let body = json!({"snapshot": "vm", "api_socket": scene.text(&format!("pool-{round}.sock"))});
        let answers: Vec<(u16, Value)> = std::thread::scope(|s| {
            let both: Vec<_> =
                (0..2).map(|_| s.spawn(|| daemon.ask("POST", "/v1/vms", Some(&body)))).collect();
            both.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        let good = answers.iter().filter(|(status, _)| *status == 201).count();
        assert_eq!(good, 1, "{answers:?}");
        goes_on(&machine.console);
    }
}

#[test]
fn two_commands_for_one_firecracker_wake_one_guest_and_leave_it() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    for round in 0..ROUNDS {
        let name = format!("pool-{round}");
        let machine = scene.start(&name);
        let socket = scene.text(&format!("{name}.sock"));
        let args = ["resume", "firecracker", "vm", "--no-daemon", "--api-socket", &socket];
        let mut both: Vec<_> = (0..2).map(|_| Running::start(scene.dormouse("host", &args))).collect();
        let mut ended = None;
        wait_until("one of two to be refused", || {
            ended = both.iter_mut().position(|one| one.child().try_wait().unwrap().is_some());
            ended.is_some()
        });
        let refused = both.remove(ended.unwrap()).end();
        assert!(!refused.status.success(), "both were served: {refused:?}");
        goes_on(&machine.console);
    }
}

#[test]
fn a_vm_outlives_a_daemon_that_keeps_none() {
    let Some(scene) = scene() else { return };
    let mut daemon = served(&scene, &[]);
    let machine = scene.start("pool");
    let request =
        json!({"id": "one", "snapshot": "vm", "api_socket": scene.text("pool.sock"), "prefetch": false});
    let vm = daemon.post("/v1/vms", &request);
    daemon.terminate();
    daemon.process.done();
    let mut other = Served::start(&scene, &["--no-keep"]);
    other.terminate();
    other.process.done();
    let daemon = Served::start(&scene, &[]);
    wait_until("it to be taken up", || daemon.get("/v1/vms/one")["state"] != "starting");
    let again = daemon.get("/v1/vms/one");
    assert_eq!((&again["state"], &again["pid"]), (&json!("running"), &vm["pid"]), "{again}");
    goes_on(&machine.console);
}

#[test]
fn ctrl_c_at_the_daemons_terminal_leaves_its_vms() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let mut daemon = Served::start_with(&scene, &[], |command| {
        command.process_group(0);
    });
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    let group = format!("-{}", daemon.process.child().id());
    let sent = std::process::Command::new("kill").args(["-INT", "--", &group]).status().unwrap();
    assert!(sent.success());
    daemon.process.done();
    let daemon = Served::start(&scene, &[]);
    wait_until("it to be taken up", || daemon.get("/v1/vms/one")["state"] == "running");
    assert_eq!(daemon.get("/v1/vms/one")["pid"], vm["pid"]);
    goes_on(&console);
}

#[test]
fn a_lost_vm_is_not_answered_for_by_the_one_before_it() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let socket = scene.path("fc.sock");
    let wake = |id: &str| daemon.wake(&scene, id, json!({"api_socket": socket, "prefetch": false}));
    let (vm, _) = wake("first");
    let _end = Mortal::of(&vm);
    let sleep = json!({"name": "vm", "replace": true, "api_socket": socket});
    let first = daemon.post("/v1/standby", &sleep);
    wait_until("its end", || daemon.get("/v1/vms/first")["state"] == "ended");
    // The answer was lost: it is the same once more.
    assert_eq!(daemon.post("/v1/standby", &sleep), first);
    let (vm, _) = wake("second");
    let _end = Mortal::of(&vm);
    kill("-9", vm["pid"].as_u64().unwrap());
    wait_until("its end", || daemon.get("/v1/vms/second")["state"] == "ended");
    assert_eq!(daemon.refused("POST", "/v1/standby", &sleep).1, "vmm");
}

#[test]
fn a_vm_is_not_put_on_standby_by_another_vms_socket() {
    let Some(scene) = scene() else { return };
    let daemon = served(&scene, &[]);
    let (one, console) = daemon.wake(&scene, "one", json!({}));
    let (two, _) = daemon.wake(&scene, "two", json!({}));
    let _end = [&one, &two].map(Mortal::of);
    let sleep = json!({"name": "later", "api_socket": two["api_socket"]});
    assert_eq!(daemon.refused("POST", "/v1/vms/one/standby", &sleep), (400, "usage".into()));
    assert!(is_there(one["pid"].as_u64().unwrap()) && is_there(two["pid"].as_u64().unwrap()));
    console.goes_on(1);
}

/// Its document comes when the VM runs; what goes wrong later is told on standard error and by the exit code.
#[test]
fn a_vm_that_fails_after_its_document_adds_no_second_one() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let machine = scene.start("pool");
    let socket = scene.text("pool.sock");
    let report = scene.text("no-such-directory/report");
    let args = ["resume", "firecracker", "vm", "--no-daemon", "--api-socket", &socket, "--report", &report];
    let mut resume = Running::start(scene.dormouse("host", &args));
    machine.console.wait_for(".", 1);
    machine.process.kill().unwrap();
    wait_until("it to end", || resume.child().try_wait().unwrap().is_some());
    let output = resume.end();
    let documents: Vec<Value> =
        serde_json::Deserializer::from_slice(&output.stdout).into_iter().map(Result::unwrap).collect();
    assert_eq!(documents.len(), 1, "{documents:?}");
    assert_eq!((documents[0]["name"].as_str(), output.status.code()), (Some("vm"), Some(1)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-directory"), "{output:?}");
}
