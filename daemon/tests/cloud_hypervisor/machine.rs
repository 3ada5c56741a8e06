//! A real Cloud Hypervisor, and the guest program in it.
#![allow(dead_code, reason = "tests and the benchmark each use their part")]

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dormouse_cloud_hypervisor::VmmApi;
use dormouse_guest::{self as guest, GuestParams, elf};

pub(crate) const MEMORY_MIB: u64 = 128;
/// Pages that the guest fills, and verifies for ever: 16 MiB.
pub(crate) const TOUCHED_PAGES: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(120);

/// The binaries, as the environment names them.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    /// The VMM that guests wake in.
    pub(crate) wakes: PathBuf,
    /// The VMM that guests sleep from: the same, unless KVM here cannot save nested state, as which a stock build insists
    /// on.
    pub(crate) sleeps: PathBuf,
}

impl Binaries {
    /// `None` if there is none.
    pub(crate) fn of_environment() -> Option<Self> {
        let set = |name| std::env::var_os(name).map(PathBuf::from);
        let wakes = set("DORMOUSE_CLOUD_HYPERVISOR")?;
        let sleeps = set("DORMOUSE_CLOUD_HYPERVISOR_SLEEPS").unwrap_or_else(|| wakes.clone());
        Some(Self { wakes, sleeps })
    }
}

/// A VMM; killed if it is still there.
pub(crate) struct Machine {
    process: Child,
    api: PathBuf,
}

impl Machine {
    /// Starts `binary` in `directory` and waits until its API takes connections.
    pub(crate) fn start(binary: &Path, directory: &Path, name: &str, args: &[&str]) -> Self {
        let api = directory.join(format!("{name}.api"));
        // What an earlier one left.
        let _ = std::fs::remove_file(&api);
        let log = File::create(directory.join(format!("{name}.log"))).unwrap();
        let mut command = Command::new(binary);
        command.arg("--api-socket").arg(&api).args(args).stdin(Stdio::null());
        // Its filter of system calls does not foresee backtraces.
        command.env_remove("RUST_BACKTRACE");
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let mut machine = Machine { process: command.spawn().unwrap(), api };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&machine.api).is_err() {
            let ended = machine.process.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "no API: {ended:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        machine
    }

    /// Starts one with the guest program, and waits until that has verified its memory.
    pub(crate) fn boot(binary: &Path, directory: &Path, serial: &Path) -> Self {
        let kernel = directory.join("guest.elf");
        let params = GuestParams::new(TOUCHED_PAGES, 7).unwrap();
        let program = elf::pvh_executable(guest::entry32().unwrap(), guest::program().unwrap(), &params);
        std::fs::write(&kernel, program).unwrap();
        let memory = format!("size={MEMORY_MIB}M,shared=on");
        let file = format!("file={}", serial.display());
        let args = ["--kernel", kernel.to_str().unwrap(), "--memory", &memory, "--cpus", "boot=1"];
        let args = [&args[..], &["--serial", &file, "--console", "off"]].concat();
        let machine = Self::start(binary, directory, "boot", &args);
        wait_for(serial, '.', 1);
        machine
    }

    pub(crate) fn api(&self) -> &str {
        self.api.to_str().unwrap()
    }

    pub(crate) fn client(&self) -> VmmApi {
        VmmApi::new(&self.api, PATIENCE)
    }

    /// Waits until it has ended by itself.
    pub(crate) fn ended(mut self) -> bool {
        self.process.wait().unwrap().success()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the guest has said since the VMM opened the file.
pub(crate) fn said(serial: &Path) -> String {
    std::fs::read_to_string(serial).unwrap_or_default()
}

/// Waits until the guest has said `what` so many times.
pub(crate) fn wait_for(serial: &Path, what: char, times: usize) {
    let deadline = Instant::now() + PATIENCE;
    while said(serial).matches(what).count() < times {
        assert!(Instant::now() < deadline, "the guest does not say {what:?}: {:?}", said(serial));
        std::thread::sleep(Duration::from_micros(200));
    }
}
