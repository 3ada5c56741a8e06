//! Standby and resume, again and again.

use std::hash::{DefaultHasher, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::scene::{Console, MEMORY_MIB, PAGES, Running, Scene, scene, wait_until};

const GENERATIONS: usize = 10;

/// A VM that `dormouse resume` woke.
pub(crate) struct Awake {
    dormouse: Option<Running>,
    pub(crate) console: Console,
    pub(crate) document: Value,
    report: PathBuf,
}

/// Wakes `name` on a host that has never seen it.
pub(crate) fn wake(scene: &Scene, name: &str, host: &str, more: &[&str]) -> Awake {
    let (console, report) = (scene.text(&format!("{host}.console")), scene.path(&format!("{host}.report")));
    let socket = scene.text(&format!("{host}.api"));
    let arguments = ["resume", "firecracker", name, "--firecracker", scene.binary(), "--api-socket", &socket];
    let options = ["--console", &console, "--report", report.to_str().unwrap()];
    let mut command = scene.dormouse(host, &[&arguments[..], &options, more].concat());
    let out = scene.path(&format!("{host}.out"));
    command.stdin(Stdio::piped()).stdout(std::fs::File::create(&out).unwrap());
    let mut dormouse = Running::start(command);
    let document = || serde_json::from_slice::<Value>(&std::fs::read(&out).unwrap()).ok();
    wait_until("the guest to wake", || {
        if let Some(status) = dormouse.child().try_wait().unwrap() {
            panic!("{status}: {:?}", dormouse.stderr());
        }
        document().is_some()
    });
    Awake {
        document: document().unwrap(),
        dormouse: Some(dormouse),
        console: Console(console.into()),
        report,
    }
}

pub(crate) fn standby(scene: &Scene, host: &str, socket: &Path, name: &str, more: &[&str]) -> Value {
    let arguments = ["standby", "firecracker", "--api-socket", socket.to_str().unwrap(), name];
    scene.done(host, &[&arguments[..], more].concat())
}

/// A hash of the memory of `name` as the store has it.
fn memory(scene: &Scene, name: &str) -> u64 {
    let file = scene.path("exported");
    scene.done("exporter", &["export", name, "--memory", file.to_str().unwrap()]);
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(bytes.len() as u64, MEMORY_MIB << 20);
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    hasher.finish()
}

#[test]
fn ten_generations_lose_nothing() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let disk = scene.text("disk");
    std::fs::write(&disk, b"a drive's file").unwrap();
    let with_disk = ["--disk", &format!("root={disk}")];
    let first = standby(&scene, "host0", &scene.path("boot.sock"), "gen-0", &with_disk);
    scene.done("host0", &["export", "gen-0", "--disk", &format!("root={disk}.back")]);
    assert_eq!(std::fs::read(format!("{disk}.back")).unwrap(), b"a drive's file");
    assert_eq!((&first["kind"], &first["ended"]), (&"full".into(), &true.into()), "{first}");
    assert!(first["pause_us"].as_u64() <= first["resumable_us"].as_u64(), "{first}");
    assert!(first["resumable_us"].as_u64() < first["durable_us"].as_u64(), "{first}");
    drop(machine);
    let mut memories = vec![memory(&scene, "gen-0")];

    for generation in 1..=GENERATIONS {
        let (before, now) = (format!("gen-{}", generation - 1), format!("gen-{generation}"));
        let host = format!("host{generation}");
        let mut awake = wake(&scene, &before, &host, &[]);
        let phases = awake.document["phases"].as_array().unwrap().iter();
        let names: Vec<_> = phases.map(|p| p["name"].as_str().unwrap()).collect();
        for phase in ["open", "spawn", "handshake", "first page installed", "load", "resume"] {
            assert!(names.contains(&phase), "{phase} is not in {names:?}");
        }
        // Every page of the generation it slept in, then of the next.
        awake.console.wait_for(".", 1);
        awake.type_bytes(b"m");
        awake.console.wait_for("M", 1);
        awake.console.goes_on(1);
        awake.type_bytes(b"g");
        awake.console.wait_for(&format!("g{generation:08x}"), 1);
        // Once it answers again it has read that; a byte on its way would be lost, and leave it parked.
        let answers = awake.console.times("A");
        awake.type_bytes(b"a");
        awake.console.wait_for("A", answers + 1);

        let socket = PathBuf::from(awake.document["api_socket"].as_str().unwrap());
        let document = standby(&scene, &host, &socket, &now, &[]);
        assert_eq!((&document["kind"], &document["parent"]), (&"diff".into(), &before.into()), "{document}");
        let captured = document["captured_bytes"].as_u64().unwrap();
        let rewritten = PAGES / 8 * 4096;
        assert!((rewritten..rewritten + 96 * 4096).contains(&captured), "{captured} for {rewritten}");
        awake.done();
        awake.console.assert_no_wrong_page();
        let report = awake.report();
        assert_eq!(report["failures"], Value::Array(vec![]), "{report}");
        memories.push(memory(&scene, &now));
    }

    // No two generations are the same, and every earlier one is still what it was, for the guest as well.
    for (generation, then) in memories.iter().enumerate() {
        assert_eq!(memories.iter().filter(|m| *m == then).count(), 1);
        let name = format!("gen-{generation}");
        assert_eq!(*then, memory(&scene, &name), "{name} has changed");
        let host = format!("again{generation}");
        let mut awake = wake(&scene, &name, &host, &["--no-prefetch"]);
        awake.console.wait_for(".", 1);
        awake.type_bytes(b"g");
        awake.console.wait_for(&format!("g{generation:08x}"), 1);
        awake.console.assert_no_wrong_page();
        awake.end();
    }
}

impl Awake {
    pub(crate) fn type_bytes(&mut self, bytes: &[u8]) {
        self.dormouse.as_mut().unwrap().type_bytes(bytes);
    }

    /// Waits for the end of `dormouse`, whose VM has ended.
    pub(crate) fn done(&mut self) {
        self.dormouse.take().unwrap().done();
    }

    /// Ends the VM, and `dormouse` with it.
    pub(crate) fn end(mut self) {
        self.kill_vm();
        self.done();
    }

    /// What was served, once it is done.
    pub(crate) fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(&self.report).unwrap()).unwrap()
    }

    pub(crate) fn kill_vm(&self) {
        let pid = self.document["pid"].as_u64().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    }
}

impl Drop for Awake {
    /// A test that failed leaves no VM behind. As long as `dormouse` runs, the VM's number is its own.
    fn drop(&mut self) {
        if self.dormouse.as_mut().is_some_and(|d| d.child().try_wait().is_ok_and(|ended| ended.is_none())) {
            self.kill_vm();
        }
    }
}

#[test]
fn a_guest_that_keeps_running_is_captured_in_differences_of_itself() {
    let Some(scene) = scene() else { return };
    let mut machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let socket = scene.path("boot.sock");
    let first = standby(&scene, "home", &socket, "first", &["--keep-running"]);
    assert_eq!((&first["kind"], &first["ended"]), (&"full".into(), &false.into()), "{first}");
    machine.process.type_bytes(b"m").unwrap();
    machine.console.wait_for("M", 1);
    let second = standby(&scene, "home", &socket, "second", &["--keep-running"]);
    assert_eq!((&second["kind"], &second["parent"]), (&"diff".into(), &"first".into()), "{second}");
    // Over a parent that it does not come from, a difference would be a machine that never was.
    machine.process.type_bytes(b"m").unwrap();
    machine.console.wait_for("M", 2);
    let third = standby(&scene, "home", &socket, "third", &["--parent", "first"]);
    assert_eq!((&third["kind"], &third["parent"]), (&"full".into(), &"first".into()), "{third}");
    machine.console.assert_no_wrong_page();
    for (generation, name) in ["first", "second", "third"].into_iter().enumerate() {
        let mut awake = wake(&scene, name, &format!("{name}-host"), &[]);
        awake.console.wait_for(".", 1);
        awake.type_bytes(b"g");
        awake.console.wait_for(&format!("g{generation:08x}"), 1);
        awake.console.assert_no_wrong_page();
        awake.end();
    }
}
