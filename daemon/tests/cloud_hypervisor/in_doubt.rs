//! A store that does not say whether the snapshot is durable: the VM is answered once that is known.

use std::fs::{self, File};
use std::time::Duration;

use super::held_store::{HeldStore, Hold};
use super::vmm::{Scene, document, scene, wait_until};

/// Puts a VM on standby while the store goes away at the write of the reference, and has it come back once somebody
/// waits for that.
fn sleep_in_doubt(scene: &Scene, hold: Hold) -> (bool, super::vmm::Vmm) {
    let vmm = scene.vmm("vmm", true);
    let store = HeldStore::start(scene.path("store"), Duration::ZERO);
    store.hold(hold);
    let log = scene.path("log");
    let mut command =
        scene.dormouse("home", &["standby", "cloud-hypervisor", "vm", "--api-socket", &vmm.api()]);
    super::slow_s3::use_store(&mut command, &store.address);
    command.stderr(File::create(&log).unwrap());
    let mut command = command.spawn().unwrap();
    wait_until("somebody to wait for the store", || {
        let said = fs::read_to_string(&log).unwrap();
        assert!(command.try_wait().unwrap().is_none(), "it did not wait: {said}");
        said.contains("not known whether the snapshot is stored")
    });
    assert!(!vmm.has("goes-on"));
    store.come_back();
    let output = command.wait_with_output().unwrap();
    let document = document(&output);
    assert_eq!(output.status.success(), document["ended"] == true, "{document}");
    (output.status.success(), vmm)
}

/// It was told to go on, and there were two.
#[test]
fn a_vm_whose_snapshot_may_be_durable_is_not_told_to_go_on() {
    let Some(scene) = scene() else { return };
    let (done, vmm) = sleep_in_doubt(&scene, Hold::ThenAway);
    assert!(done && !vmm.has("goes-on"));
    assert!(vmm.ended());
    scene.done("home", &["verify", "vm"]);
}

#[test]
fn a_vm_whose_snapshot_turns_out_not_to_be_durable_goes_on() {
    let Some(scene) = scene() else { return };
    let (done, vmm) = sleep_in_doubt(&scene, Hold::AwayBeforeItIsDone);
    assert!(!done);
    vmm.wait_for("goes-on");
}
