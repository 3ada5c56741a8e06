//! Two standbys of one VM at the same time: whichever is second knows what the first did, or waits.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::generations::wake;
use crate::held_store::HeldStore;
use crate::scene::{Running, Scene, document, scene};
use crate::slow_s3::use_store;

/// A standby of the booted VM as `name`, on `store`, by no daemon.
pub(crate) fn standby(scene: &Scene, store: &HeldStore, name: &str, more: &[&str]) -> Command {
    let socket = scene.text("boot.sock");
    let arguments = ["standby", "firecracker", "--no-daemon", "--api-socket", &socket, name];
    let mut command = scene.dormouse("home", &[&arguments[..], more].concat());
    use_store(&mut command, &store.address);
    command
}

/// What a command that must fail says of why.
pub(crate) fn error(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["error"].clone()
}

/// The second had chosen its parent, was overtaken by a whole standby, after which Firecracker counted anew, and stored
/// a difference over a parent that it was none of.
#[test]
fn a_standby_that_waits_for_the_store_is_not_overtaken_by_another() {
    let Some(scene) = scene() else { return };
    let mut machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    document(&standby(&scene, &store, "p", &["--keep-running"]).output().unwrap());
    machine.process.type_bytes(b"m").unwrap();
    machine.console.wait_for("M", 1);

    let release = store.hold_reading("p");
    let waiting = Running::start(standby(&scene, &store, "b", &[]));
    store.wait_held();
    let overtaking = standby(&scene, &store, "a", &["--keep-running"]).output().unwrap();
    drop(release);
    let stored = document(&waiting.end());
    machine.console.assert_no_wrong_page();

    let mut awake = wake(&scene, "b", "b-host", &[]);
    awake.console.wait_for(".", 1);
    awake.type_bytes(b"g");
    awake.console.wait_for("g00000001", 1);
    awake.console.assert_no_wrong_page();
    awake.end();
    assert_eq!((&stored["kind"], &stored["parent"]), (&json!("diff"), &json!("p")), "{stored}");
    assert!(String::from_utf8_lossy(&overtaking.stdout).contains("\"busy\""), "{overtaking:?}");
}
