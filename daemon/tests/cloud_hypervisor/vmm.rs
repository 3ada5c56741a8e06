//! A process like Cloud Hypervisor's, and a directory with a store beside it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::peer::{OK, Receive, Slot, Vm, receive_at, word};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const SLOTS: [Slot; 2] = [
    Slot { slot: 0, gpa: 0, bytes: 6 << 20, file_offset: 0 },
    Slot { slot: 2, gpa: 4 << 30, bytes: 2 << 20, file_offset: 0 },
];
pub(crate) const PAGES: u64 = 2048;
pub(crate) const SEED: u64 = 11;
/// What a VM that woke writes into its last page.
const MARK: u64 = (4 << 30) + (2 << 20) - 4096;
/// Where the process is told of its directory, and whether it has a VM.
const DIRECTORY: &str = "DORMOUSE_TEST_VMM";
const BOOTED: &str = "DORMOUSE_TEST_VMM_BOOTED";

pub(crate) struct Scene {
    directory: tempfile::TempDir,
}

/// The scene, if a VMM can have a userfaultfd here. Says so if not; fails if it must.
pub(crate) fn scene() -> Option<Scene> {
    let required = std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_some_and(|v| v == "1");
    if let Err(why) = super::sys::Guard::new() {
        assert!(!required, "DORMOUSE_REQUIRE_UFFD=1, but: {why}");
        dormouse_testkit::skipped!("no userfaultfd: {why}");
        return None;
    }
    Some(Scene { directory: tempfile::tempdir().unwrap() })
}

impl Scene {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The built binary, on the scene's store, as a host that keeps its caches in `host`.
    pub(crate) fn dormouse(&self, host: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("DORMOUSE_") || text.starts_with("XDG_") {
                command.env_remove(&name);
            }
        }
        command.args(args).arg("--json").env("DORMOUSE_STORE", self.path("store"));
        command.current_dir(self.directory.path()).env("HOME", self.path(host));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs what must succeed, and gives its document.
    pub(crate) fn done(&self, host: &str, args: &[&str]) -> Value {
        let output = self.dormouse(host, args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        document(&output)
    }

    /// Runs what must fail, and gives what it says.
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        let output = self.dormouse("home", args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        document(&output).to_string()
    }

    /// A VMM in a process of its own, with a VM or without.
    pub(crate) fn vmm(&self, name: &str, booted: bool) -> Vmm {
        let directory = self.path(name);
        std::fs::create_dir(&directory).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "vmm::process", "--nocapture"]).env(DIRECTORY, &directory);
        command.env(BOOTED, if booted { "1" } else { "0" }).stdout(Stdio::null());
        let vmm = Vmm { process: command.spawn().unwrap(), directory };
        vmm.wait_for("api.sock");
        vmm
    }
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The one document of a run.
pub(crate) fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// A VMM; killed if it is still there.
pub(crate) struct Vmm {
    process: Child,
    directory: PathBuf,
}

impl Vmm {
    pub(crate) fn api(&self) -> String {
        self.directory.join("api.sock").to_str().unwrap().to_owned()
    }

    /// Waits for a file that the process makes.
    pub(crate) fn wait_for(&self, file: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.directory.join(file).exists() {
            assert!(Instant::now() < deadline, "{file} does not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn has(&self, file: &str) -> bool {
        self.directory.join(file).exists()
    }

    /// Waits until the process has ended by itself.
    pub(crate) fn ended(mut self) -> bool {
        self.process.wait().unwrap().success()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test: the VMM's process, where the environment says so.
#[test]
fn process() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let booted = std::env::var_os(BOOTED).is_some_and(|v| v == "1");
    let vm = Arc::new(Mutex::new(booted.then(|| Vm::new(&SLOTS, SEED))));
    let listener = UnixListener::bind(directory.join("api.sock")).unwrap();
    for stream in listener.incoming() {
        let (mut stream, directory, vm) = (stream.unwrap(), directory.clone(), vm.clone());
        std::thread::spawn(move || {
            let (request, body) = read_request(&mut stream);
            let (status, body) = match answer(&directory, &vm, &request, &body) {
                Ok(Value::Null) => ("204 No Content", String::new()),
                Ok(value) => ("200 OK", value.to_string()),
                Err(chain) => ("500 Internal Server Error", Value::from(chain).to_string()),
            };
            // The client may have gone, as it does when a migration ended its process.
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\nServer: Cloud Hypervisor API\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        });
    }
}

fn read_request(stream: &mut UnixStream) -> (String, Value) {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length =
        head.lines().find_map(|l| l.strip_prefix("Content-Length: ")).map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let request = head.split(" HTTP").next().unwrap().to_owned();
    (request, serde_json::from_slice(&body).unwrap_or_default())
}

type SharedVm = Arc<Mutex<Option<Vm>>>;

fn answer(directory: &Path, vm: &SharedVm, request: &str, body: &Value) -> Result<Value, Vec<String>> {
    let path = |key: &str| PathBuf::from(body[key].as_str().unwrap().strip_prefix("unix:").unwrap());
    match request {
        "GET /api/v1/vm.info" if vm.lock().unwrap().is_some() => Ok(serde_json::json!({"state": "Running"})),
        "GET /api/v1/vm.info" => Err(vec!["The VM info is not available".into(), "VM is not created".into()]),
        "PUT /api/v1/vm.send-migration" => {
            assert_eq!(body["local"], true);
            let (stream, vm, directory) =
                (UnixStream::connect(path("destination_url")).unwrap(), vm.clone(), directory.to_owned());
            // Answered at once, as upstream.
            std::thread::spawn(move || {
                let sent = vm.lock().unwrap().as_ref().unwrap().send(&stream, true);
                match sent {
                    Ok(OK) => std::process::exit(0),
                    _ => std::fs::write(directory.join("goes-on"), "").unwrap(),
                }
            });
            Ok(Value::Null)
        }
        "PUT /api/v1/vm.receive-migration" => {
            if vm.lock().unwrap().is_some() {
                return Err(vec!["Cannot receive".into(), "a VM is already created".into()]);
            }
            let postcopy = body["memory_mode"] == "Postcopy";
            let received =
                receive_at(&path("receiver_url"), Receive { postcopy, prefault: true }).join().unwrap();
            let awake = received.map_err(|why| vec!["The migration failed".to_owned(), why])?;
            let (vm, directory) = (vm.clone(), directory.to_owned());
            std::thread::spawn(move || {
                // The guest: a mark that was left counts for the page it is in.
                let marked = awake.load(MARK) != word(MARK, SEED);
                awake.verify_but(SEED, marked.then_some(MARK));
                awake.store(MARK, awake.load(MARK).wrapping_add(1));
                let state = awake.state.clone();
                let slots = awake.take_memory();
                *vm.lock().unwrap() = Some(Vm { slots, state });
                std::fs::write(directory.join(if marked { "verified-mark" } else { "verified" }), "")
                    .unwrap();
            });
            Ok(Value::Null)
        }
        other => Err(vec![format!("there is no {other}")]),
    }
}
