//! Real Firecracker: set `DORMOUSE_FIRECRACKER` to its binary. With `DORMOUSE_REQUIRE_FIRECRACKER=1` its
//! absence is a failure.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dormouse_firecracker::api::SnapshotKind;
use dormouse_firecracker::{
    ApiError, ConsoleInput, Firecracker, FirecrackerOptions, HandshakeListener, accept_handshake,
};
use dormouse_guest::{self as guest, GuestParams, elf};

const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_MIB: u64 = 64;
const PAGES: u64 = 1024;

fn binary() -> Option<PathBuf> {
    let path = std::env::var_os("DORMOUSE_FIRECRACKER").map(PathBuf::from);
    let required = std::env::var_os("DORMOUSE_REQUIRE_FIRECRACKER").is_some_and(|v| v == "1");
    assert!(
        path.is_some() || !required,
        "DORMOUSE_REQUIRE_FIRECRACKER=1, but DORMOUSE_FIRECRACKER is not set"
    );
    if path.is_none() {
        dormouse_testkit::skipped!("DORMOUSE_FIRECRACKER does not name a Firecracker binary");
    }
    path
}

struct Scene {
    directory: tempfile::TempDir,
    binary: PathBuf,
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, name: &str) -> Machine {
        let console = self.path(&format!("{name}.console"));
        let options = FirecrackerOptions {
            binary: self.binary.clone(),
            api_socket: self.path(&format!("{name}.sock")),
            console: console.clone(),
            input: ConsoleInput::Typed,
            log: Some(self.path(&format!("{name}.log"))),
            own_group: false,
        };
        let process = Firecracker::spawn(&options, PATIENCE).expect("Firecracker");
        Machine { process, console }
    }

    fn boot(&self) -> Machine {
        let kernel = self.path("guest.elf");
        let params = GuestParams::new(PAGES, 7).expect("valid");
        std::fs::write(&kernel, elf::executable(guest::program().expect("x86-64"), &params)).expect("write");
        let machine = self.start("boot");
        let api = machine.process.api(PATIENCE);
        api.machine_config(MEMORY_MIB, true).expect("machine");
        api.boot_source(&kernel).expect("kernel");
        api.start().expect("start");
        machine
    }
}

struct Machine {
    process: Firecracker,
    console: PathBuf,
}

impl Machine {
    /// What the guest said. Firecracker itself prints a line with a date and "Running Firecracker" at its
    /// start, before it has opened its log.
    fn said(&self) -> String {
        let text = self.raw();
        text.lines().filter(|line| !line.contains("[anonymous-instance:")).collect()
    }

    fn wait_for(&mut self, part: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.said().matches(part).count() < times {
            assert!(self.process.try_wait().expect("wait").is_none(), "Firecracker ended: {}", self.raw());
            assert!(Instant::now() < deadline, "no {part:?}: {}", self.raw());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn raw(&self) -> String {
        std::fs::read_to_string(&self.console).unwrap_or_default()
    }

    fn times(&self, part: &str) -> usize {
        self.said().matches(part).count()
    }

    fn assert_all_right(&self) {
        assert_eq!((self.times("X"), self.times("x"), self.times("!")), (0, 0, 0), "{}", self.said());
    }

    fn snapshot(&self, kind: SnapshotKind, state: &Path, memory: &Path) {
        let api = self.process.api(PATIENCE);
        api.pause().expect("pause");
        api.create_snapshot(kind, state, memory).expect("snapshot");
    }
}

fn scene() -> Option<Scene> {
    Some(Scene { binary: binary()?, directory: tempfile::tempdir().expect("directory") })
}

fn stored_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).expect("there").blocks() * 512
}

#[test]
fn the_guest_boots_answers_and_is_snapshotted() {
    let Some(scene) = scene() else { return };
    let mut machine = scene.boot();
    machine.wait_for(".", 1);
    assert!(machine.said().starts_with("BRA."), "{}", machine.said());
    let (full, diff) = (scene.path("full.mem"), scene.path("diff.mem"));
    machine.snapshot(SnapshotKind::Full, &scene.path("full.state"), &full);
    assert_eq!(std::fs::metadata(&full).expect("there").len(), MEMORY_MIB << 20);

    machine.process.api(PATIENCE).resume().expect("resume");
    let passes = machine.times(".");
    machine.process.type_bytes(b"m").expect("type");
    machine.wait_for("M", 1);
    machine.wait_for(".", passes + 1);
    machine.process.type_bytes(b"p").expect("type");
    machine.wait_for("p", 1);
    machine.snapshot(SnapshotKind::Diff, &scene.path("diff.state"), &diff);
    machine.assert_all_right();
    let (full, diff) = (stored_bytes(&full), stored_bytes(&diff));
    eprintln!("full snapshot {full} bytes stored, diff after one generation {diff} bytes");
    let rewritten = PAGES / 8 * 4096;
    assert!((rewritten..rewritten + 64 * 4096).contains(&diff), "{diff} for {rewritten} rewritten");
}

#[test]
fn a_snapshot_wakes_from_a_file_in_the_generation_it_slept_in() {
    let Some(scene) = scene() else { return };
    let mut machine = scene.boot();
    machine.wait_for("R", 1);
    machine.process.type_bytes(b"m").expect("type");
    machine.wait_for("M", 1);
    machine.process.type_bytes(b"p").expect("type");
    machine.wait_for("p", 1);
    let (state, memory) = (scene.path("state"), scene.path("mem"));
    machine.snapshot(SnapshotKind::Full, &state, &memory);
    machine.assert_all_right();
    machine.process.kill().expect("kill");

    let mut machine = scene.start("wake");
    machine.process.api(PATIENCE).load_snapshot_file(&state, &memory, false, true).expect("load");
    machine.process.type_bytes(b"a").expect("type");
    machine.wait_for(".", 1);
    assert!(machine.said().starts_with("A."), "{}", machine.said());
    machine.process.type_bytes(b"g").expect("type");
    machine.wait_for("g00000001", 1);
    machine.assert_all_right();
}

#[test]
fn its_handshake_is_understood() {
    let Some(scene) = scene() else { return };
    let mut machine = scene.boot();
    machine.wait_for("R", 1);
    let (state, memory) = (scene.path("state"), scene.path("mem"));
    machine.snapshot(SnapshotKind::Full, &state, &memory);
    machine.process.kill().expect("kill");

    let socket = scene.path("uffd.sock");
    let listener = HandshakeListener::bind(&socket).expect("bind");
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    // Nobody serves its pages here, so the load does not end by itself: it reads guest memory even when it
    // does not resume the guest.
    let loading = std::thread::spawn(move || api.load_snapshot_uffd(&state, &socket, false, false));
    let shake = accept_handshake(&listener, PATIENCE).expect("handshake");
    eprintln!("{shake:?}");
    assert_eq!(shake.regions.iter().map(|r| r.bytes).sum::<u64>(), MEMORY_MIB << 20);
    assert_eq!(Some(shake.peer.pid as u32), machine.process.pid());
    machine.process.kill().expect("kill before the descriptor goes");
    loading.join().expect("thread").expect_err("its VMM was killed");
    drop(shake);
}

#[test]
fn a_refusal_carries_its_own_words() {
    let Some(scene) = scene() else { return };
    let machine = scene.start("refuse");
    let error = machine.process.api(PATIENCE).boot_source(Path::new("/nonexistent")).expect_err("refused");
    assert!(matches!(&error, ApiError::Refused { status: 400, .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent") || error.to_string().contains("kernel"), "{error}");
}
