//! Both commands drive Cloud Hypervisor through its API.

use super::vmm::{PAGES, scene};

#[test]
fn a_vm_sleeps_and_wakes_in_another_process_for_three_generations() {
    let Some(scene) = scene() else { return };
    let vmm = scene.vmm("first", true);
    let slept = scene.done("home", &["standby", "cloud-hypervisor", "one", "--api-socket", &vmm.api()]);
    assert_eq!((&slept["ended"], &slept["was_running"]), (&true.into(), &true.into()));
    assert_eq!(slept["import"]["logical_bytes"], PAGES * 4096);
    assert!(slept["pause_us"].as_u64() > Some(0));
    assert!(vmm.ended(), "the VMM has ended by itself");

    // Another host: nothing of the first one's cache is there.
    let vmm = scene.vmm("second", false);
    let report = scene.text("report.json");
    let woken = scene.done(
        "other",
        &["resume", "cloud-hypervisor", "one", "--api-socket", &vmm.api(), "--report", &report],
    );
    assert_eq!((&woken["memory"], &woken["running"]), (&"on-demand".into(), &true.into()));
    let phases: Vec<_> =
        woken["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["open", "start", "config", "shown", "state", "asked", "complete"]);
    vmm.wait_for("verified");
    // The command ended when the VM had all it needs.
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["asked"]["requests"], &report["error"]), (&PAGES.into(), &serde_json::Value::Null));

    // It has changed one page since.
    let args = ["standby", "cloud-hypervisor", "two", "--api-socket", &vmm.api(), "--parent", "one"];
    let slept = scene.done("other", &args);
    assert_eq!(slept["import"]["new_bytes"], 4096);
    assert!(vmm.ended());
    let vmm = scene.vmm("third", false);
    let woken =
        scene.done("home", &["resume", "cloud-hypervisor", "two", "--api-socket", &vmm.api(), "--eager"]);
    assert_eq!(woken["memory"], "eager");
    vmm.wait_for("verified-mark");
}

#[test]
fn what_can_be_refused_is_refused_before_the_guest_is_touched() {
    let Some(scene) = scene() else { return };
    let vmm = scene.vmm("vmm", true);
    let api = vmm.api();
    let standby = ["standby", "cloud-hypervisor", "vm", "--api-socket", &api];
    let run = |more: &[&str]| scene.dormouse("home", &[&standby[..], more].concat()).output().unwrap();
    assert_eq!(run(&["--disk", "root=/nowhere"]).status.code(), Some(2));
    assert_eq!(run(&["--parent", "nobody"]).status.code(), Some(1));
    assert!(!vmm.has("goes-on"), "nothing was asked of it");
    // A VMM with a VM takes no other, and says so in its own words.
    scene.done("home", &standby);
    assert!(vmm.ended());
    let vmm = scene.vmm("busy", true);
    let said = scene.fails(&["resume", "cloud-hypervisor", "vm", "--api-socket", &vmm.api()]);
    assert!(said.contains("a VM is already created"), "{said}");
    let again = scene.dormouse("home", &["standby", "cloud-hypervisor", "vm", "--api-socket", &vmm.api()]);
    let mut again = again;
    assert_eq!(again.output().unwrap().status.code(), Some(1), "the name is taken");
    // One without a VM has nothing to send.
    let empty = scene.vmm("empty", false);
    let said = scene.fails(&["standby", "cloud-hypervisor", "other", "--api-socket", &empty.api()]);
    assert!(said.contains("VM is not created"), "{said}");
}
