//! The real Cloud Hypervisor, where `DORMOUSE_CLOUD_HYPERVISOR` names one.

use std::path::PathBuf;

use serde_json::Value;

use super::machine::{Binaries, Machine, said, wait_for};
use super::vmm::{Scene, document, scene};

struct Bed {
    scene: Scene,
    binaries: Binaries,
    serial: PathBuf,
}

/// A guest on standby as `one`, if there is a VMM that can be put there.
fn asleep() -> Option<Bed> {
    let required = std::env::var_os("DORMOUSE_REQUIRE_CLOUD_HYPERVISOR").is_some_and(|v| v == "1");
    let Some(binaries) = Binaries::of_environment() else {
        assert!(!required, "Cloud Hypervisor is required, but DORMOUSE_CLOUD_HYPERVISOR is not set");
        dormouse_testkit::skipped!("DORMOUSE_CLOUD_HYPERVISOR does not name a Cloud Hypervisor binary");
        return None;
    };
    let scene = scene()?;
    let bed = Bed { serial: scene.path("serial"), scene, binaries };
    let machine = Machine::boot(&bed.binaries.sleeps, &bed.scene.path(""), &bed.serial);
    let args = ["standby", "cloud-hypervisor", "one", "--api-socket", machine.api()];
    let output = bed.scene.dormouse("home", &args).output().unwrap();
    let log = std::fs::read_to_string(bed.scene.path("boot.log")).unwrap();
    if !output.status.success() && log.contains("GetNestedState") {
        assert!(!required, "Cloud Hypervisor is required, but KVM here has no nested state for it to save");
        dormouse_testkit::skipped!(
            "KVM here has no nested state, without which this Cloud Hypervisor saves no VM"
        );
        return None;
    }
    assert!(output.status.success(), "{output:?}");
    let slept = document(&output);
    assert_eq!((&slept["ended"], &slept["was_running"]), (&true.into(), &true.into()));
    assert!(machine.ended(), "the VMM has ended by itself");
    Some(bed)
}

impl Bed {
    fn start(&self, name: &str) -> Machine {
        // The next VMM makes it anew.
        std::fs::remove_file(&self.serial).unwrap();
        Machine::start(&self.binaries.wakes, &self.scene.path(""), name, &[])
    }

    /// Wakes the guest on demand in a VMM called `name` until it has verified its memory twice; the report.
    fn wake(&self, name: &str, snapshot: &str) -> (Machine, Value) {
        let machine = self.start(name);
        let report = self.scene.text("report.json");
        let args =
            ["resume", "cloud-hypervisor", snapshot, "--api-socket", machine.api(), "--report", &report];
        let woken = self.scene.done("home", &args);
        assert_eq!((&woken["memory"], &woken["running"]), (&"on-demand".into(), &true.into()));
        self.verified();
        let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        assert_eq!((&report["error"], &report["killed_because"]), (&Value::Null, &Value::Null));
        (machine, report["asked"].clone())
    }

    fn verified(&self) {
        wait_for(&self.serial, '.', 2);
        assert!(!said(&self.serial).contains('X'), "a wrong page: {}", said(&self.serial));
    }
}

#[test]
fn a_guest_of_the_real_vmm_sleeps_and_wakes_on_demand_and_the_second_time_has_its_working_set() {
    let Some(bed) = asleep() else { return };
    let (machine, asked) = bed.wake("first", "one");
    let pages = super::machine::MEMORY_MIB * 256;
    assert_eq!(asked["requests"], pages, "the VMM asks for each page once");
    drop(machine);
    // What it touched before the VMM came past it is shown to the next one before it asks; without any such, what was
    // prefetched by then.
    let stream = bed.scene.done("home", &["show", "one"])["stream"]["pages"].as_u64();
    let (machine, asked) = bed.wake("second", "one");
    assert_eq!(asked["requests"], pages);
    let shown = asked["shown"].as_u64().unwrap();
    assert!(shown > 0, "nothing was shown before the VMM asked");
    assert!(
        stream.is_none_or(|stream| shown <= stream),
        "{shown} pages were shown of a stream of {stream:?}"
    );
    drop(machine);
}

#[test]
fn a_guest_of_the_real_vmm_wakes_eagerly() {
    let Some(bed) = asleep() else { return };
    let machine = bed.start("eager");
    let args = ["resume", "cloud-hypervisor", "one", "--api-socket", machine.api(), "--eager"];
    assert_eq!(bed.scene.done("home", &args)["memory"], "eager");
    bed.verified();
}
