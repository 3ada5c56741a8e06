//! A directory with a store, and Firecrackers in it.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use dormouse_firecracker::{ApiClient, ConsoleInput, Firecracker, FirecrackerOptions};
use dormouse_guest::{self as guest, GuestParams, elf};
use serde_json::Value;

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const MEMORY_MIB: u64 = 64;
pub(crate) const PAGES: u64 = 2048;

pub(crate) struct Scene {
    directory: tempfile::TempDir,
    binary: PathBuf,
}

/// The scene, if there is a Firecracker.
pub(crate) fn scene() -> Option<Scene> {
    let binary = std::env::var_os("DORMOUSE_FIRECRACKER").map(PathBuf::from);
    let required = std::env::var_os("DORMOUSE_REQUIRE_FIRECRACKER").is_some_and(|v| v == "1");
    assert!(binary.is_some() || !required, "Firecracker is required, but DORMOUSE_FIRECRACKER is not set");
    let Some(binary) = binary else {
        dormouse_testkit::skipped!("DORMOUSE_FIRECRACKER does not name a Firecracker binary");
        return None;
    };
    Some(Scene { binary, directory: tempfile::tempdir().unwrap() })
}

impl Scene {
    /// One without a Firecracker.
    pub(crate) fn bare() -> Self {
        Scene { binary: PathBuf::new(), directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn binary(&self) -> &str {
        self.binary.to_str().unwrap()
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
        command.env("XDG_RUNTIME_DIR", self.path("run"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs what must succeed, and gives its document.
    pub(crate) fn done(&self, host: &str, args: &[&str]) -> Value {
        document(&self.dormouse(host, args).output().unwrap())
    }

    /// An empty Firecracker of the test's own.
    pub(crate) fn start(&self, name: &str) -> Machine {
        let console = self.path(&format!("{name}.console"));
        let options = FirecrackerOptions {
            binary: self.binary.clone(),
            api_socket: self.path(&format!("{name}.sock")),
            console: console.clone(),
            input: ConsoleInput::Typed,
            log: Some(self.path(&format!("{name}.log"))),
            own_group: false,
        };
        let process = Firecracker::spawn(&options, PATIENCE).unwrap();
        Machine { process, console: Console(console) }
    }

    /// A Firecracker with a guest that has filled its memory.
    pub(crate) fn boot(&self, track_dirty: bool) -> Machine {
        self.boot_as(|api| api.machine_config(MEMORY_MIB, track_dirty).unwrap())
    }

    /// The same, of a machine that `configure` describes.
    pub(crate) fn boot_as(&self, configure: impl FnOnce(&ApiClient)) -> Machine {
        self.boot_guest(&GuestParams::new(PAGES, 7).unwrap(), configure)
    }

    /// The same, of a guest with these parameters.
    pub(crate) fn boot_guest(&self, params: &GuestParams, configure: impl FnOnce(&ApiClient)) -> Machine {
        let kernel = self.path("guest.elf");
        std::fs::write(&kernel, elf::executable(guest::program().unwrap(), params)).unwrap();
        let machine = self.start("boot");
        let api = machine.process.api(PATIENCE);
        configure(&api);
        api.boot_source(&kernel).unwrap();
        api.start().unwrap();
        machine.console.wait_for("R", 1);
        machine
    }
}

pub(crate) struct Machine {
    pub(crate) process: Firecracker,
    pub(crate) console: Console,
}

/// What a guest says.
#[derive(Clone)]
pub(crate) struct Console(pub(crate) PathBuf);

impl Console {
    /// Firecracker logs lines of its own amid that, each a moment and `[anonymous-instance:...`.
    pub(crate) fn said(&self) -> String {
        const MOMENT: usize = "2026-11-23T12:00:00.000000000".len();
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        let guest = |line: &str| match line.find(" [anonymous-instance:") {
            Some(logged) => line[..logged.saturating_sub(MOMENT)].to_owned(),
            None => line.to_owned(),
        };
        text.lines().map(guest).collect()
    }

    pub(crate) fn times(&self, part: &str) -> usize {
        self.said().matches(part).count()
    }

    pub(crate) fn wait_for(&self, part: &str, times: usize) {
        wait_until(&format!("{part:?} in what the guest says"), || {
            self.assert_no_wrong_page();
            self.times(part) >= times
        });
    }

    /// Waits until the guest has verified its memory so many times more.
    pub(crate) fn goes_on(&self, passes: usize) {
        self.wait_for(".", self.times(".") + passes);
    }

    pub(crate) fn assert_no_wrong_page(&self) {
        assert_eq!((self.times("X"), self.times("x"), self.times("!")), (0, 0, 0), "{}", self.said());
    }
}

/// A `dormouse` that runs until its VM ends. Killed if the test fails.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        Running(Some(command.spawn().unwrap()))
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    /// Types into its standard input.
    pub(crate) fn type_bytes(&mut self, bytes: &[u8]) {
        let input = self.child().stdin.as_mut().unwrap();
        input.write_all(bytes).unwrap();
        input.flush().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Output {
        wait_until("dormouse to end", || self.child().try_wait().unwrap().is_some());
        self.0.take().unwrap().wait_with_output().unwrap()
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn done(self) {
        let output = self.end();
        assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }

    /// What it says of errors; to be asked once it has ended.
    pub(crate) fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.child().stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn kill(mut self) {
        let mut child = self.0.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Its file is there a moment before it is listened on.
pub(crate) fn wait_for_socket(path: &Path) {
    wait_until("a socket", || UnixStream::connect(path).is_ok());
}

/// A peer that says `bytes` and hangs up, or stays.
pub(crate) fn say(path: &Path, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// The one document of a run that must have succeeded.
pub(crate) fn document(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}{}", output.status, String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {error}"))
}
