//! Firecracker under its jailer: another user, another root, no `/proc`. Set `DORMOUSE_JAILER`; takes root.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dormouse_firecracker::ApiClient;
use dormouse_guest::{self as guest, GuestParams, elf};
use serde_json::json;

use crate::scene::{Console, MEMORY_MIB, PAGES, PATIENCE, Scene, scene, wait_for_socket, wait_until};
use crate::served::Served;

const UID: u32 = 54_321;

/// The scene, and the jailer's binary.
fn jail_scene() -> Option<(Scene, PathBuf)> {
    let scene = scene()?;
    let jailer = std::env::var_os("DORMOUSE_JAILER").map(PathBuf::from);
    let required = std::env::var_os("DORMOUSE_REQUIRE_FIRECRACKER").is_some_and(|v| v == "1");
    assert!(jailer.is_some() || !required, "Firecracker is required, but DORMOUSE_JAILER is not set");
    match jailer {
        Some(jailer) if rustix::process::geteuid().is_root() => Some((scene, jailer)),
        _ => {
            dormouse_testkit::skipped!("the jailer takes root, and DORMOUSE_JAILER to name it");
            None
        }
    }
}

/// A Firecracker in a jail of its own.
struct Jailed {
    process: Child,
    root: PathBuf,
    console: Console,
}

impl Jailed {
    fn start(scene: &Scene, jailer: &PathBuf, id: &str) -> Self {
        let (base, console) = (scene.path("jail"), scene.path(&format!("{id}.console")));
        // The jailer makes what is below.
        fs::create_dir_all(&base).unwrap();
        let uid = UID.to_string();
        let process = Command::new(jailer)
            .args(["--id", id, "--exec-file", scene.binary(), "--uid", &uid, "--gid", &uid])
            .arg("--chroot-base-dir")
            .arg(&base)
            .args(["--", "--api-sock", "/api.sock", "--level", "Off"])
            .stdin(Stdio::null())
            .stdout(File::create(&console).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let name = PathBuf::from(scene.binary()).file_name().unwrap().to_owned();
        let jailed =
            Jailed { process, root: base.join(name).join(id).join("root"), console: Console(console) };
        wait_for_socket(&jailed.socket());
        jailed
    }

    fn socket(&self) -> PathBuf {
        self.root.join("api.sock")
    }

    fn api(&self) -> ApiClient {
        ApiClient::new(&self.socket(), PATIENCE)
    }

    /// What is in its root besides what the jailer and Firecracker made.
    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(&self.root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> =
            names.filter(|n| n.starts_with(".dormouse") || n.contains("uffd.sock")).collect();
        names.sort();
        names
    }

    fn wait_ended(&mut self) {
        wait_until("Firecracker to end", || self.process.try_wait().unwrap().is_some());
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_jailed_guest_sleeps_and_wakes_in_other_jails() {
    let Some((scene, jailer)) = jail_scene() else { return };
    let mut first = Jailed::start(&scene, &jailer, "first");
    let kernel = first.root.join("guest.elf");
    let params = GuestParams::new(PAGES, 7).unwrap();
    fs::write(&kernel, elf::executable(guest::program().unwrap(), &params)).unwrap();
    chown(&kernel, Some(UID), Some(UID)).unwrap();
    let api = first.api();
    api.machine_config(MEMORY_MIB, true).unwrap();
    api.boot_source("/guest.elf".as_ref()).unwrap();
    api.start().unwrap();
    first.console.wait_for(".", 1);

    let socket = first.socket().into_os_string().into_string().unwrap();
    let standby = scene.done("host", &["standby", "firecracker", "--api-socket", &socket, "vm"]);
    assert_eq!((&standby["kind"], &standby["ended"]), (&json!("full"), &json!(true)), "{standby}");
    first.wait_ended();
    assert_eq!(first.left(), Vec::<String>::new(), "something of the capture is left on the disk");

    // By the daemon, with differences, from jail to jail.
    let daemon = Served::start(&scene, &[]);
    for (from, to) in [("vm", "later"), ("later", "latest")] {
        let mut jailed = Jailed::start(&scene, &jailer, to);
        let request = json!({"id": to, "snapshot": from, "api_socket": jailed.socket()});
        let vm = daemon.post("/v1/vms", &request);
        assert_eq!(vm["pid"], jailed.process.id(), "{vm}");
        jailed.console.wait_for(".", 2);
        jailed.console.assert_no_wrong_page();
        assert_eq!(jailed.left(), Vec::<String>::new());
        let standby = daemon.post(&format!("/v1/vms/{to}/standby"), &json!({"name": to}));
        assert_eq!((&standby["kind"], &standby["parent"]), (&json!("diff"), &json!(from)), "{standby}");
        jailed.wait_ended();
        assert_eq!(jailed.left(), Vec::<String>::new());
    }
    scene.done("host", &["verify"]);
}

#[test]
fn a_listener_for_another_user_serves_a_jail_and_nobody_else() {
    let Some((scene, jailer)) = jail_scene() else { return };
    crate::serve_uffd::parked(&scene);
    let daemon = Served::start(&scene, &[]);
    let jailed = Jailed::start(&scene, &jailer, "one");
    let socket = jailed.root.join("uffd.sock");
    let listener = daemon.post("/v1/listeners", &json!({"snapshot": "vm", "socket": socket, "uid": UID}));
    // Root may open the socket, and is not whom it is for.
    let machine = scene.start("root");
    let api = machine.process.api(Duration::from_secs(2));
    api.load_snapshot_uffd(&scene.path("vmstate"), &socket, false, true).unwrap_err();
    let state = jailed.root.join("vmstate");
    fs::copy(scene.path("vmstate"), &state).unwrap();
    chown(&state, Some(UID), Some(UID)).unwrap();
    jailed.api().load_snapshot_uffd("/vmstate".as_ref(), "/uffd.sock".as_ref(), false, true).unwrap();
    jailed.console.wait_for(".", 2);
    jailed.console.assert_no_wrong_page();
    let path = format!("/v1/listeners/{}", listener["id"].as_str().unwrap());
    let counted = daemon.get(&path);
    assert_eq!((&counted["served"], &counted["refused"]), (&json!(1), &json!(1)), "{counted}");
}
