//! A store with an image, servers of it, and guests.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dormouse_core::PAGE_BYTES;
use dormouse_restore::{Uffd, UffdError, UffdOptions};
use rustix::process::{Pid, Signal};

use crate::guest::{PAGES, word};
use crate::systemd::Manager;

pub(crate) const TERM: Signal = Signal::TERM;
pub(crate) const HUP: Signal = Signal::HUP;
pub(crate) const INT: Signal = Signal::INT;

const PATIENCE: Duration = Duration::from_secs(120);

/// A small generator, the same on every machine.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub(crate) fn shuffled(&mut self, n: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..n).collect();
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }
}

/// A number from the environment.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

pub(crate) struct Scene {
    directory: tempfile::TempDir,
}

/// The scene, if processes may have userfaultfds here.
pub(crate) fn scene() -> Option<Scene> {
    match Uffd::create(UffdOptions::default()) {
        Ok(_) => {}
        Err(why @ (UffdError::NotPermitted(_) | UffdError::Missing(_))) => {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {why}");
            dormouse_testkit::skipped!("{why}");
            return None;
        }
        Err(why) => panic!("{why}"),
    }
    let scene = Scene { directory: tempfile::tempdir().unwrap() };
    let page = |p: u64| (0..PAGE_BYTES).step_by(8).flat_map(move |o| word(p, o).to_ne_bytes());
    std::fs::write(scene.path("memory"), (0..PAGES).flat_map(page).collect::<Vec<u8>>()).unwrap();
    scene.import(&[]);
    Some(scene)
}

impl Scene {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn dormouse(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("DORMOUSE_") || text.starts_with("XDG_") {
                command.env_remove(&name);
            }
        }
        command.env("DORMOUSE_STORE", self.path("store")).env("HOME", self.path("home"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.env_remove("NOTIFY_SOCKET");
        command
    }

    fn import(&self, options: &[&str]) {
        let mut import = self.dormouse();
        import.args(["import", "vm", "--quiet", "--memory"]).arg(self.path("memory")).args(options);
        assert!(import.status().unwrap().success());
    }

    pub(crate) fn import_something_else_as_vm(&self) {
        std::fs::write(self.path("memory"), vec![0xEE; PAGES as usize * PAGE_BYTES]).unwrap();
        self.import(&["--replace"]);
    }

    /// A server, started and not waited for.
    pub(crate) fn serve(&self, options: &[&str]) -> Server {
        self.start(self.server(options))
    }

    /// A server that systemd starts.
    pub(crate) fn serve_under(&self, manager: &Manager, options: &[&str]) -> Server {
        self.start(manager.command(&self.server(options)))
    }

    fn server(&self, options: &[&str]) -> Command {
        let mut serve = self.dormouse();
        serve.args(["serve-uffd", "vm", "--socket"]).arg(self.path("uffd")).args(options);
        serve
    }

    fn start(&self, mut serve: Command) -> Server {
        serve.stdin(Stdio::null()).stdout(Stdio::null());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        Server { child: serve.stderr(log).spawn().unwrap(), log: self.path("log") }
    }

    /// A guest of the server there is, or of the next.
    pub(crate) fn guest(&self, seed: u64) -> Guest {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest::guest", "--ignored", "--nocapture"])
            .env("DORMOUSE_TEST_SOCKET", self.path("uffd"))
            .env("DORMOUSE_TEST_SEED", seed.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (signs, said) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(String::new())));
        let mut stderr = child.stderr.take().unwrap();
        let (counted, heard) = (signs.clone(), said.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(got @ 1..) = stderr.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..got]);
                counted.fetch_add(text.matches('.').count() as u64, Ordering::SeqCst);
                heard.lock().unwrap().push_str(text.trim_matches('.'));
            }
        });
        Guest { child, signs, said, log: self.path("log") }
    }

    fn holder(&self) -> Option<Pid> {
        Some(rustix::net::sockopt::socket_peercred(self.connect_to_holder()?).unwrap().pid)
    }

    fn connect_to_holder(&self) -> Option<std::os::fd::OwnedFd> {
        let fd = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        );
        let fd = fd.unwrap();
        let address = rustix::net::SocketAddrUnix::new(self.path("uffd.keep")).unwrap();
        rustix::net::connect(&fd, &address).ok()?;
        Some(fd)
    }

    /// Waits for a holder that has the one VM there is, `guest`, unless that has ended: until then it depends on its
    /// server.
    pub(crate) fn wait_for_holder(&self, guest: &Guest) {
        let holds = || {
            let fd = self.connect_to_holder()?;
            let mut answer = [0; 256];
            for request in ["{\"do\":\"hello\",\"version\":1}\n", "{\"do\":\"take\"}\n"] {
                rustix::io::write(&fd, request.as_bytes()).ok()?;
                rustix::io::read(&fd, &mut answer).ok()?;
            }
            Some(String::from_utf8_lossy(&answer).contains("\"served_elsewhere\":1"))
        };
        wait_until("a holder that has the VM", || guest.is_done() || holds() == Some(true));
    }

    pub(crate) fn kill_holder(&self) {
        let holder = self.holder().unwrap();
        rustix::process::kill_process(holder, Signal::KILL).unwrap();
        wait_until("the holder to be gone", || self.holder() != Some(holder));
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(holder) = self.holder() {
            let _ = rustix::process::kill_process(holder, Signal::KILL);
        }
    }
}

pub(crate) struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    pub(crate) fn kill(mut self) {
        self.end_by(Signal::KILL);
    }

    pub(crate) fn end_by(&mut self, signal: Signal) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "the server has ended by itself: {}", self.said());
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn must_end_well(&mut self) {
        wait_until("the server to end", || self.child.try_wait().unwrap().is_some());
        assert!(self.child.wait().unwrap().success(), "{}", self.said());
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct Guest {
    child: Child,
    signs: Arc<AtomicU64>,
    said: Arc<Mutex<String>>,
    log: PathBuf,
}

impl Guest {
    fn signs(&self) -> u64 {
        self.signs.load(Ordering::SeqCst)
    }

    /// Whether it has got a page, so that its server keeps it.
    pub(crate) fn has_begun(&self) -> bool {
        self.signs() > 0
    }

    pub(crate) fn is_done(&self) -> bool {
        // A process that nobody has waited for is still there to be asked.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z'))
    }

    pub(crate) fn wait_begun(&self) {
        wait_until("a guest's first page", || self.has_begun());
    }

    /// It gets pages, or has seen all of them.
    pub(crate) fn must_go_on(&self) {
        let before = self.signs();
        let told = || std::fs::read_to_string(&self.log).unwrap_or_default();
        let deadline = Instant::now() + PATIENCE;
        while self.signs() == before && !self.is_done() {
            assert!(Instant::now() < deadline, "a guest hangs; its servers said: {}", told());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether it has ended, which must be well.
    pub(crate) fn completed(&mut self, count: &mut u64) -> bool {
        match self.child.try_wait().unwrap() {
            None => false,
            Some(status) => {
                let told = || std::fs::read_to_string(&self.log).unwrap_or_default();
                assert!(status.success(), "{status}: {}; its servers: {}", self.said.lock().unwrap(), told());
                *count += 1;
                true
            }
        }
    }

    pub(crate) fn must_complete(&mut self) {
        let mut count = 0;
        let told = std::fs::read_to_string(&self.log).unwrap_or_default();
        wait_until(&format!("a guest to see all of its memory; its servers said: {told}"), || {
            self.completed(&mut count)
        });
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
