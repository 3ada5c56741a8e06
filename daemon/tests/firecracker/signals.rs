//! Signals to a standby that no daemon does: the guest goes on, and the command says so.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};

use crate::held_store::{HeldStore, Hold};
use crate::scene::{Machine, PATIENCE, Running, Scene, document, scene, wait_until};
use crate::served::{is_there, kill};
use crate::two_standbys::standby;

fn signal(standby: &mut Running, signal: &str) {
    kill(signal, u64::from(standby.child().id()));
}

fn error(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["error"].clone()
}

fn runs_on(scene: &Scene, machine: &Machine, store: &HeldStore) {
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Running");
    machine.console.goes_on(1);
    machine.console.assert_no_wrong_page();
    let noted = fs::read_dir(scene.path("run/dormouse")).unwrap().flatten();
    let noted: Vec<_> = noted
        .map(|note| note.file_name())
        .filter(|name| name.to_string_lossy().contains("standby"))
        .collect();
    assert!(noted.is_empty(), "{noted:?}");
    assert!(!scene.path("store/plain/refs/later").exists(), "{}", store.address);
}

/// A standby that reads its name for the `nth` time, and waits for the answer until what this gives is dropped.
fn reading(store: &HeldStore, nth: usize, command: Command) -> (Running, std::sync::mpsc::Sender<()>) {
    let mut release = store.hold_reading("later");
    let running = Running::start(command);
    store.wait_held();
    for _ in 1..nth {
        release = store.hold_reading("later");
        store.wait_held();
    }
    (running, release)
}

#[test]
fn a_signal_before_the_capture_leaves_the_guest_alone() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    let (mut running, _release) = reading(&store, 1, standby(&scene, &store, "later", &[]));
    signal(&mut running, "-INT");
    let failure = error(&running.end());
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("SIGINT; nothing was done and the VM is as it was"), "{failure}");
    runs_on(&scene, &machine, &store);
}

/// The guest was left paused, without a word.
#[test]
fn a_signal_while_the_guest_is_stored_lets_it_go_on() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    for name in ["INT", "TERM", "HUP"] {
        let (mut running, _release) = reading(&store, 2, standby(&scene, &store, "later", &[]));
        assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Paused");
        signal(&mut running, &format!("-{name}"));
        let failure = error(&running.end());
        assert_eq!(failure["kind"], "interrupted", "{failure}");
        let message = failure["message"].as_str().unwrap();
        assert!(message.contains(&format!("SIG{name}; nothing was stored and the VM runs on")), "{failure}");
        runs_on(&scene, &machine, &store);
    }
    // One that was started to outlive its terminal does.
    let inner = standby(&scene, &store, "later", &["--keep-running"]);
    let mut deaf = Command::new("sh");
    deaf.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(inner.get_program()).args(inner.get_args());
    deaf.current_dir(inner.get_current_dir().unwrap());
    deaf.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => deaf.env(name, value),
            None => deaf.env_remove(name),
        };
    }
    let (mut running, release) = reading(&store, 2, deaf);
    signal(&mut running, "-HUP");
    drop(release);
    document(&running.end());
}

#[test]
fn a_signal_while_the_snapshot_is_named_waits_for_the_store() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    store.hold(Hold::BeforeItIsAnswered);
    let mut running = Running::start(standby(&scene, &store, "later", &[]));
    store.wait_held();
    signal(&mut running, "-INT");
    let mut lines = BufReader::new(running.child().stderr.take().unwrap()).lines().map_while(Result::ok);
    let told = lines.find(|line| line.starts_with("SIGINT: "));
    assert!(told.is_some_and(|line| line.contains("the store is waited for")));
    assert!(running.child().try_wait().unwrap().is_none(), "it waits");
    signal(&mut running, "-INT");
    let failure = error(&running.end());
    assert!(failure["message"].as_str().unwrap().contains("give the same command again"), "{failure}");
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Paused");
    let finished = document(&standby(&scene, &store, "later", &[]).output().unwrap());
    assert_eq!((&finished["ended"], &finished["finished_later"]), (&json!(true), &json!(true)), "{finished}");
    wait_until("the VM's end", || !is_there(u64::from(machine.process.pid().unwrap())));
}
