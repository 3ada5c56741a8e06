//! Limits that a capture would break: they are told before the pause, and break nothing.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;

use dormouse_firecracker::VmmProcess;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::scene::{MEMORY_MIB, Machine, PATIENCE, Running, Scene, document, scene, wait_until};
use crate::served::kill;

fn standby(scene: &Scene, more: &[&str]) -> std::process::Command {
    let socket = scene.text("boot.sock");
    let arguments = ["standby", "firecracker", "--no-daemon", "--api-socket", &socket, "later"];
    scene.dormouse("home", &[&arguments[..], more].concat())
}

fn error(output: &std::process::Output) -> Value {
    assert!(!output.status.success(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["error"].clone()
}

fn runs_on(machine: &Machine) {
    assert_eq!(machine.process.api(PATIENCE).get("/").unwrap()["state"], "Running");
    machine.console.goes_on(1);
    machine.console.assert_no_wrong_page();
}

/// A control group of this test's own, with so much memory. Gone once it is empty.
struct Group(PathBuf);

impl Group {
    /// None where groups cannot be made.
    fn of(name: &str, bytes: u64) -> Option<Self> {
        let (root, limit) = match fs::exists("/sys/fs/cgroup/memory/memory.limit_in_bytes").unwrap() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        // Where it is not on already, and may not be, making the group's limit fails.
        let _ = fs::write(format!("{root}/cgroup.subtree_control"), "+memory");
        let group = PathBuf::from(format!("{root}/dormouse-{name}-{}", std::process::id()));
        let made = fs::create_dir(&group).and_then(|()| fs::write(group.join(limit), bytes.to_string()));
        if let Err(error) = made {
            dormouse_testkit::skipped!("no control group of one's own can be made here: {error}");
            return None;
        }
        Some(Group(group))
    }

    fn add(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn procs(&self) -> String {
        self.0.join("cgroup.procs").display().to_string()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        wait_until("an empty group", || match fs::remove_dir(&self.0) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        });
    }
}

#[test]
fn a_limit_of_file_sizes_is_told_before_the_pause() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let pid = Pid::from_raw(machine.process.pid().unwrap() as i32);
    let limit = Rlimit { current: Some((MEMORY_MIB << 20) / 2), maximum: None };
    prlimit(pid, Resource::Fsize, limit).unwrap();
    let refused = error(&standby(&scene, &[]).output().unwrap());
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("RLIMIT_FSIZE") && message.contains("33554432"), "{message}");
    runs_on(&machine);
}

/// The kernel killed Firecracker, and the message said that its guest stands still.
#[test]
fn a_full_capture_is_not_charged_to_firecracker() {
    let Some(scene) = scene() else { return };
    let Some(group) = Group::of("vmm", (MEMORY_MIB << 20) * 3 / 4) else { return };
    let mut machine = scene.boot_as(|api| {
        let connection = UnixStream::connect(scene.path("boot.sock")).unwrap();
        group.add(VmmProcess::of(&connection).unwrap().peer().pid as u32);
        api.machine_config(MEMORY_MIB, true).unwrap();
    });
    machine.console.wait_for(".", 1);
    let done = document(&standby(&scene, &["--keep-running"]).output().unwrap());
    assert_eq!(done["kind"], "full", "{done}");
    runs_on(&machine);
    scene.done("home", &["verify", "later"]);
    // A difference is charged to it: there is room for what the guest can have written.
    machine.process.type_bytes(b"m").unwrap();
    machine.console.wait_for("M", 1);
    let done = document(&standby(&scene, &["--keep-running"]).output().unwrap());
    assert_eq!(done["kind"], "full", "{done}");
    assert!(done["full_because"].as_str().unwrap().contains("control group"), "{done}");
    runs_on(&machine);
    drop(machine);
}

/// The daemon was killed in the midst of it, and the guest stood still.
#[test]
fn a_full_capture_that_dormouse_has_no_room_for_is_refused() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let Some(group) = Group::of("own", (MEMORY_MIB << 20) * 3 / 2) else { return };
    let dormouse = standby(&scene, &[]);
    let mut inside = std::process::Command::new("sh");
    inside.args(["-c", "echo $$ > \"$0\" && exec \"$@\"", &group.procs()]);
    inside.arg(dormouse.get_program()).args(dormouse.get_args()).stdin(Stdio::null());
    inside.current_dir(dormouse.get_current_dir().unwrap());
    for (name, value) in dormouse.get_envs() {
        match value {
            Some(value) => inside.env(name, value),
            None => inside.env_remove(name),
        };
    }
    let refused = error(&inside.output().unwrap());
    let message = refused["message"].as_str().unwrap();
    let limit = group.0.display().to_string();
    assert!(message.contains(&limit) && message.contains("charged to Dormouse"), "{message}");
    runs_on(&machine);
}

/// It was told that the guest stands still.
#[test]
fn a_firecracker_that_dies_is_told_as_dead() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let pid = u64::from(machine.process.pid().unwrap());
    kill("-STOP", pid);
    let asking = Running::start(standby(&scene, &[]));
    let notes = || fs::read_dir(scene.path("run/dormouse")).into_iter().flatten().flatten();
    let noted = || notes().any(|note| note.path().extension().is_some_and(|e| e == "standby"));
    wait_until("a standby that is under way", noted);
    kill("-KILL", pid);
    let failure = error(&asking.end());
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("has ended, and its guest with it"), "{message}");
    assert_eq!((&failure["kind"], &failure["retryable"]), (&json!("vmm"), &json!(false)), "{failure}");
    assert!(!noted(), "nothing is left to do of it");
}
