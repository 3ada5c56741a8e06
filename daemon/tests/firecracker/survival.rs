//! Firecracker's guests outlive the server of their memory. `DORMOUSE_TEST_FIRECRACKER_KILLS` says how many servers
//! are killed, `DORMOUSE_TEST_SEED` when.

use std::thread::JoinHandle;
use std::time::Duration;

use dormouse_firecracker::ApiError;

use crate::scene::{Machine, PATIENCE, Running, Scene, scene, wait_for_socket, wait_until};
use crate::serve_uffd::parked;
use crate::slow_s3;

/// Passes over all of its memory after which a clone has shown what it should.
const PASSES: usize = 2;
/// What the store takes to answer, so that faults are outstanding when a server is killed.
const STORE_DELAY: Duration = Duration::from_millis(3);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A small generator, the same on every machine.
fn below(seed: &mut u64, n: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % n
}

/// A server whose store takes its time, if it is at an `address`.
fn serve(scene: &Scene, address: Option<&str>, options: &[&str]) -> Running {
    let socket = scene.text("uffd.sock");
    // What was fetched is on no disk: each server has to fetch it anew.
    let mut command =
        scene.dormouse("nowhere", &[&["serve-uffd", "vm", "--socket", &socket, "--keep"], options].concat());
    let log = std::fs::OpenOptions::new().create(true).append(true).open(scene.path("servers")).unwrap();
    command.stderr(log).stdout(std::process::Stdio::null()).env("DORMOUSE_CACHE_DIR", "/dev/null/none");
    if let Some(address) = address {
        slow_s3::use_store(&mut command, address);
    }
    Running::start(command)
}

/// A clone that is being loaded, or runs.
struct Clone {
    machine: Machine,
    loading: Option<JoinHandle<Result<(), ApiError>>>,
}

impl Clone {
    fn start(scene: &Scene, name: &str) -> Self {
        let machine = scene.start(name);
        let (api, state, socket) =
            (machine.process.api(PATIENCE), scene.path("vmstate"), scene.path("uffd.sock"));
        let loading = std::thread::spawn(move || {
            while std::os::unix::net::UnixStream::connect(&socket).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            api.load_snapshot_uffd(&state, &socket, false, true)
        });
        Clone { machine, loading: Some(loading) }
    }

    /// Whether its load was answered. One whose server dies before that is loaded anew.
    fn is_loaded(&mut self) -> bool {
        match self.loading.take_if(|loading| loading.is_finished()) {
            Some(loaded) => loaded.join().unwrap().unwrap(),
            None if self.loading.is_some() => return false,
            None => {}
        }
        true
    }

    fn passes(&self) -> usize {
        self.machine.console.assert_no_wrong_page();
        self.machine.console.times(".")
    }
}

#[test]
fn guests_whose_servers_are_killed_at_any_instant_go_on() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let kills = number("DORMOUSE_TEST_FIRECRACKER_KILLS", 12);
    let mut seed = number("DORMOUSE_TEST_SEED", 1);
    let (mut clones, mut started, mut loaded_anew, mut done, mut running) = (Vec::new(), 0, 0, 0, 0);
    let address = slow_s3::start(scene.path("store"), STORE_DELAY);
    let mut server = serve(&scene, Some(&address), &["--no-prefetch"]);
    for kill in 0..kills {
        while clones.len() < 3 {
            started += 1;
            clones.push(Clone::start(&scene, &format!("clone{started}")));
        }
        wait_until("some clone's load", || clones.iter_mut().any(Clone::is_loaded));
        std::thread::sleep(Duration::from_micros(below(&mut seed, 200_000)));
        assert!(server.child().try_wait().unwrap().is_none(), "the server has ended by itself");
        server.kill();
        clones.retain_mut(|clone| {
            loaded_anew += u64::from(!clone.is_loaded());
            clone.is_loaded()
        });
        running += u64::from(clones.iter().any(|clone| clone.passes() == 0));
        let prefetch = below(&mut seed, 4) == 0;
        server = serve(&scene, Some(&address), if prefetch { &[] } else { &["--no-prefetch"] });
        if kill % 4 == 3 {
            for clone in &clones {
                let before = clone.passes();
                wait_until("a guest to go on", || clone.passes() > before);
            }
        }
        done += clones.extract_if(.., |clone| clone.is_loaded() && clone.passes() >= PASSES).count();
    }
    wait_until("the last loads", || clones.iter_mut().all(Clone::is_loaded));
    for clone in clones {
        let before = clone.passes();
        wait_until("a guest to go on", || clone.passes() > before + 1);
        done += 1;
    }
    server.kill();
    eprintln!(
        "{kills} kills, {running} of them before some guest's first pass; {done} clones verified, {loaded_anew} loaded anew"
    );
    assert!(done > 0);
}

#[test]
fn a_guest_that_is_let_go_needs_no_server() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let server = serve(&scene, None, &["--once", "--detach-when-filled"]);
    wait_for_socket(scene.path("uffd.sock").as_ref());
    let mut clone = Clone::start(&scene, "clone");
    server.done();
    assert!(clone.is_loaded() || clone.loading.is_some());
    wait_until("the load", || clone.is_loaded());
    let before = clone.passes();
    wait_until("passes without a server", || clone.passes() > before + 2);
}

#[test]
fn a_resumed_guest_outlives_the_command_that_resumed_it() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let (api, console, report) = (scene.text("api.sock"), scene.text("resumed"), scene.text("report"));
    let arguments = ["resume", "firecracker", "vm", "--firecracker", scene.binary(), "--api-socket", &api];
    let options = ["--console", &console, "--report", &report, "--no-prefetch", "--keep"];
    let resume = || {
        let mut command = scene.dormouse("home", &[&arguments[..], &options].concat());
        command.stdout(std::fs::File::create(scene.path("resume")).unwrap());
        Running::start(command)
    };
    let document = || {
        let read = || serde_json::from_slice(&std::fs::read(scene.path("resume")).unwrap_or_default()).ok();
        let mut found: Option<serde_json::Value> = None;
        wait_until("what resume says", || {
            found = read();
            found.is_some()
        });
        found.unwrap()
    };
    let said = crate::scene::Console(console.clone().into());
    let mut server = resume();
    let pid = document()["pid"].as_i64().unwrap();
    for _ in 0..3 {
        server.kill();
        server = resume();
        let taken_up = document();
        assert_eq!(taken_up["pid"].as_i64(), Some(pid), "{taken_up}");
        assert_eq!(taken_up["phases"][0]["name"], "taken up", "{taken_up}");
        said.goes_on(1);
    }
    let firecracker = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(firecracker, rustix::process::Signal::KILL).unwrap();
    server.done();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(report["pid"].as_i64(), Some(pid), "{report}");
    said.assert_no_wrong_page();
}
