//! Spans of VMs and of what is done with them reach a collector, and one that is away disturbs nothing.

use std::net::TcpListener;
use std::process::Command;

use serde_json::json;

use crate::collector::{Collector, Span};
use crate::generations;
use crate::scene::{scene, wait_until};
use crate::serve_uffd::parked;
use crate::served::{Mortal, Served, served};

/// What a resume comes through, and a standby.
const RESUME: [&str; 5] = ["open", "spawn", "handshake", "load", "resume"];
const STANDBY: [&str; 5] = ["check", "capture", "import", "end", "stream"];

/// Spans are sent at once, not every five seconds.
fn at_once(command: &mut Command) {
    command.env("OTEL_BSP_SCHEDULE_DELAY", "20");
}

fn names(phases: &[Span]) -> Vec<&str> {
    phases.iter().map(|s| s.name.as_str()).collect()
}

#[test]
fn what_the_daemon_does_with_a_vm_is_one_trace_with_its_phases() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let collector = Collector::start();
    let daemon = Served::start_with(&scene, &["--otlp", &collector.url], at_once);
    let (vm, console) = daemon.wake(&scene, "one", json!({"prefetch": false}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    let standby = daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));

    let root = collector.one("vm", Some("one"));
    assert_eq!((root.service.as_str(), root.parent.len()), ("dormouse", 0), "{root:?}");
    assert_eq!((root.told("dormouse.name"), root.told("process.pid")), ("vm".into(), vm["pid"].to_string()));
    assert_eq!(json!(root.told("dormouse.snapshot")), vm["snapshot"], "{root:?}");
    assert_ne!(root.told("dormouse.faults"), "0", "{root:?}");

    let resume = collector.one("resume", Some("one"));
    assert!(resume.is_below(&root), "{resume:?} is not below {root:?}");
    assert_eq!(resume.status, 1, "{resume:?}");
    assert_eq!(resume.told("dormouse.name"), "vm");
    assert_eq!(json!(resume.told("dormouse.snapshot")), vm["snapshot"]);
    assert_eq!(names(&collector.phases(&resume)), RESUME);
    assert!(resume.events.iter().any(|e| e == "first page installed"), "{resume:?}");

    let slept = collector.one("standby", Some("one"));
    assert!(slept.is_below(&root) && slept.nanos.0 >= resume.nanos.1, "{slept:?}");
    assert_eq!(slept.told("dormouse.name"), "later");
    assert_eq!(json!(slept.told("dormouse.snapshot")), standby["snapshot"]);
    assert_eq!(slept.told("dormouse.pause_us"), standby["pause_us"].to_string());
    assert_eq!(names(&collector.phases(&slept)), STANDBY);

    // What fails says so, and how far it came.
    let refused = json!({"id": "two", "snapshot": "vm", "firecracker": "/bin/false"});
    let (_, code) = daemon.refused("POST", "/v1/vms", &refused);
    let failed = collector.one("resume", Some("two"));
    assert_eq!((failed.status, failed.told("error.type")), (2, code), "{failed:?}");
    assert_eq!(names(&collector.phases(&failed)), ["open"]);
    assert_eq!(collector.one("vm", Some("two")).status, 2);
}

#[test]
fn a_trace_goes_on_in_the_daemon_that_takes_the_vm_up() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let collector = Collector::start();
    let start = || Served::start_with(&scene, &["--otlp", &collector.url], at_once);
    let daemon = start();
    let (vm, console) = daemon.wake(&scene, "one", json!({}));
    let _end = Mortal::of(&vm);
    console.wait_for(".", 1);
    let resume = collector.one("resume", Some("one"));
    daemon.process.kill();
    let daemon = start();
    wait_until("the VM", || daemon.get("/v1/vms/one")["state"] == "running");
    daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    let slept = collector.one("standby", Some("one"));
    assert_eq!(slept.trace, resume.trace);
    // The second daemon's part of the VM's life lies below the first's, which was killed before it could send it.
    let root = collector.one("vm", Some("one"));
    assert!(slept.is_below(&root) && root.parent == resume.parent, "{root:?}");
}

#[test]
fn commands_without_a_daemon_export_all_before_they_end() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let collector = Collector::start();
    let otlp = ["--no-daemon", "--otlp", &collector.url];
    let mut awake = generations::wake(&scene, "vm", "home", &otlp);
    awake.console.wait_for(".", 1);
    let socket = scene.path("home.api");
    let arguments = ["standby", "firecracker", "--api-socket", socket.to_str().unwrap(), "later"];
    // The usual variables do as well.
    let mut command = scene.dormouse("home", &[&arguments[..], &["--no-daemon"]].concat());
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url).env("OTEL_SERVICE_NAME", "night");
    let standby = crate::scene::document(&command.output().unwrap());
    awake.done();
    let spans = collector.spans();
    // A phase may be called as its operation.
    let find = |name: &str| {
        let found = spans.iter().find(|s| s.name == name && !s.told("dormouse.name").is_empty());
        found.unwrap_or_else(|| panic!("{name}: {spans:?}"))
    };
    let (root, resume, slept) = (find("vm"), find("resume"), find("standby"));
    assert!(resume.is_below(root), "{spans:?}");
    assert_eq!(root.told("process.pid"), awake.document["pid"].to_string());
    assert_eq!(names(&collector.phases(resume)), RESUME);
    assert_eq!(
        (slept.service.as_str(), json!(slept.told("dormouse.snapshot"))),
        ("night", standby["snapshot"].clone())
    );
    assert_eq!(names(&collector.phases(slept)), STANDBY);
}

#[test]
fn a_collector_that_is_away_or_never_answers_disturbs_nothing() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    // One that nobody listens at, and one that takes connections and says nothing for ever.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let urls = [gone, silent.try_clone().unwrap()].map(|l| format!("http://{}", l.local_addr().unwrap()));
    for (number, url) in urls.iter().enumerate() {
        let set = |command: &mut Command| {
            at_once(command);
            command.env("OTEL_EXPORTER_OTLP_TIMEOUT", "100").env("OTEL_BSP_MAX_QUEUE_SIZE", "4");
        };
        let mut daemon = Served::start_with(&scene, &["--otlp", url], set);
        for id in ["one", "two"].map(|id| format!("{id}-{number}")) {
            let (vm, console) = daemon.wake(&scene, &id, json!({}));
            let _end = Mortal::of(&vm);
            console.wait_for(".", 1);
            let standby = daemon.post(&format!("/v1/vms/{id}/standby"), &json!({"name": id}));
            assert_eq!(standby["ended"], true, "{standby}");
            console.assert_no_wrong_page();
        }
        let told = |daemon: &Served| {
            let told = |l: &serde_json::Value| l.to_string().contains("spans cannot be exported");
            daemon.logged().iter().filter(|l| told(l)).count()
        };
        wait_until("a word on it", || told(&daemon) > number);
        daemon.terminate();
        assert_eq!(told(&daemon), number + 1, "it is told once");
        daemon.process.done();
    }
}

#[test]
fn nothing_is_exported_that_nobody_asked_for() {
    let Some(scene) = scene() else { return };
    let collector = Collector::start();
    let mut daemon = served(&scene, &[]);
    let (vm, _) = daemon.wake(&scene, "one", json!({}));
    let _end = Mortal::of(&vm);
    daemon.post("/v1/vms/one/standby", &json!({"name": "later"}));
    daemon.terminate();
    daemon.process.done();
    let disabled = |command: &mut Command| {
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url).env("OTEL_SDK_DISABLED", "true");
    };
    let mut daemon = Served::start_with(&scene, &[], disabled);
    let (vm, _) = daemon.wake(&scene, "two", json!({}));
    let _end = Mortal::of(&vm);
    daemon.post("/v1/vms/two/stop", &json!({}));
    daemon.terminate();
    daemon.process.done();
    assert!(collector.spans().is_empty());
    let refused = scene.dormouse("host", &["serve", "--otlp", "localhost:4318"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "that is no URL");
}
