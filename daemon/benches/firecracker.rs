//! Waking a guest in stock Firecracker: through Dormouse, through Firecracker's own file mapping, and through a handler
//! that copies each page as it faults, as Firecracker's example does. `cargo bench -p dormouse --bench firecracker`
//!
//! Timed from the request to load until the guest, which touches 16 MiB, has once verified all of it.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_benches::Row;
use dormouse_benches::stats::{median, ms};
use dormouse_firecracker::{
    ApiClient, ConsoleInput, Firecracker, FirecrackerOptions, HandshakeListener, SnapshotKind,
    accept_handshake,
};
use dormouse_guest::{self as guest, GuestParams, elf};
use dormouse_restore::sys::event::Event;
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::sys::uffd::EventBuffer;
use dormouse_restore::{Memory, PageSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_MIB: u64 = 128;
const TOUCHED_PAGES: u64 = 4096;
const TURNS: usize = 15;

struct Bed {
    dir: tempfile::TempDir,
    binary: PathBuf,
}

/// From the request until its answer, and until the first verified pass.
struct Woken {
    load: f64,
    verified: f64,
}

impl Bed {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self) -> (Firecracker, PathBuf) {
        let console = self.path("console");
        let _ = std::fs::remove_file(&console);
        let options = FirecrackerOptions {
            binary: self.binary.clone(),
            api_socket: self.path("api.sock"),
            console: console.clone(),
            input: ConsoleInput::Typed,
            log: None,
            own_group: false,
        };
        (Firecracker::spawn(&options, PATIENCE).unwrap(), console)
    }

    /// A guest that has filled its memory, as two files.
    fn sleep(&self) {
        let (machine, console) = self.start();
        let kernel = self.path("guest.elf");
        let params = GuestParams::new(TOUCHED_PAGES, 7).unwrap();
        std::fs::write(&kernel, elf::executable(guest::program().unwrap(), &params)).unwrap();
        let api = machine.api(PATIENCE);
        api.machine_config(MEMORY_MIB, false).unwrap();
        api.boot_source(&kernel).unwrap();
        api.start().unwrap();
        wait_for(&console, '.');
        api.pause().unwrap();
        api.create_snapshot(SnapshotKind::Full, &self.path("state"), &self.path("memory")).unwrap();
        machine.kill().unwrap();
    }

    /// Has a new Firecracker load by `load` and waits until the guest has verified its memory.
    fn wake(&self, load: impl FnOnce(&ApiClient)) -> Woken {
        let (machine, console) = self.start();
        let api = machine.api(PATIENCE);
        let begun = Instant::now();
        load(&api);
        let loaded = begun.elapsed();
        wait_for(&console, '.');
        let woken = Woken { load: ms(loaded), verified: ms(begun.elapsed()) };
        machine.kill().unwrap();
        woken
    }

    fn by_file(&self) -> Woken {
        self.wake(|api| {
            api.load_snapshot_file(&self.path("state"), &self.path("memory"), false, true).unwrap()
        })
    }

    fn page_by_page(&self) -> Woken {
        let socket = self.path("pages.sock");
        let listener = HandshakeListener::bind(&socket).unwrap();
        let memory = File::open(self.path("memory")).unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let handshake = accept_handshake(&listener, PATIENCE).unwrap();
                let regions: Vec<_> = handshake.regions.iter().map(|r| (r.host, r.bytes, r.offset)).collect();
                let announced: Vec<_> = regions
                    .iter()
                    .map(|&(address, bytes, _)| AnnouncedRegion {
                        address,
                        bytes,
                        page_size: PageSize::Small,
                    })
                    .collect();
                let guest = Memory::adopt(handshake.uffd, &announced).unwrap();
                serve(&guest, &regions, &memory, &over);
            });
            let woken =
                self.wake(|api| api.load_snapshot_uffd(&self.path("state"), &socket, false, true).unwrap());
            over.store(true, Ordering::Relaxed);
            woken
        })
    }

    fn dormouse(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        command.args(args).env("DORMOUSE_STORE", self.path("store")).env("HOME", self.dir.path());
        command.env("XDG_RUNTIME_DIR", self.path("run")).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    fn served(&self) -> Woken {
        let socket = self.path("dormouse.sock");
        let socket_text = socket.to_str().unwrap();
        let mut server =
            self.dormouse(&["serve-uffd", "guest", "--socket", socket_text, "--once"]).spawn().unwrap();
        while !socket.exists() {
            thread::sleep(Duration::from_millis(1));
        }
        // Everything a server does before a VM comes, it may do.
        thread::sleep(Duration::from_millis(100));
        let woken =
            self.wake(|api| api.load_snapshot_uffd(&self.path("state"), &socket, false, true).unwrap());
        server.wait().unwrap();
        woken
    }
}

/// Copies each page as it faults, and sleeps between faults.
fn serve(guest: &Memory, regions: &[(u64, u64, u64)], memory: &File, over: &AtomicBool) {
    let mut events = EventBuffer::new(1);
    let mut page = [0; 4096];
    while !over.load(Ordering::Relaxed) {
        let mut fds = [PollFd::from_borrowed_fd(guest.uffd().as_fd(), PollFlags::IN)];
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
        for event in guest.uffd().read_events(&mut events).into_iter().flatten() {
            let Event::Fault { address, .. } = event else { continue };
            let (region, at) = guest.find(address).unwrap();
            memory.read_exact_at(&mut page, regions[region].2 + at * 4096).unwrap();
            let _ = guest.regions()[region].pages(at, 1).unwrap().copy(&page);
        }
    }
}

/// A line without what Firecracker logs in it: a moment, and `[anonymous-instance:...`.
fn of_guest(line: &str) -> &str {
    const MOMENT: usize = "2026-11-23T12:00:00.000000000".len();
    line.find(" [anonymous-instance:").map_or(line, |logged| &line[..logged.saturating_sub(MOMENT)])
}

fn wait_for(console: &Path, said: char) {
    let begun = Instant::now();
    while !std::fs::read_to_string(console)
        .is_ok_and(|text| text.lines().map(of_guest).any(|t| t.contains(said)))
    {
        assert!(begun.elapsed() < PATIENCE, "the guest does not answer");
        thread::sleep(Duration::from_micros(200));
    }
}

fn main() {
    let Some(binary) = std::env::var_os("DORMOUSE_FIRECRACKER").map(PathBuf::from) else {
        eprintln!(
            "SKIPPED: DORMOUSE_FIRECRACKER does not name a Firecracker binary; scripts/fetch-test-parts gets one"
        );
        return;
    };
    let bed = Bed { dir: tempfile::tempdir().unwrap(), binary };
    bed.sleep();
    let (state, memory) = (bed.path("state"), bed.path("memory"));
    let state = format!("vmstate={}", state.display());
    let imported = bed
        .dormouse(&["import", "guest", "--memory", memory.to_str().unwrap(), "--state", &state])
        .status()
        .unwrap();
    assert!(imported.success());
    let trained =
        bed.dormouse(&["train", "guest", "--firecracker", bed.binary.to_str().unwrap()]).status().unwrap();
    assert!(trained.success());
    let mut samples: [Vec<Woken>; 3] = Default::default();
    for turn in 0..=TURNS {
        let woken = [bed.by_file(), bed.page_by_page(), bed.served()];
        if turn > 0 {
            samples.iter_mut().zip(woken).for_each(|(all, one)| all.push(one));
        }
    }
    let of = |side: usize, value: fn(&Woken) -> f64| median(samples[side].iter().map(value).collect());
    let rows = [
        Row::reported("firecracker_load_file", "ms", of(2, |w| w.load), of(0, |w| w.load)),
        // The target is the same and 5 ms.
        Row::at_most(
            "firecracker_verified_file",
            "ms",
            of(2, |w| w.verified),
            of(0, |w| w.verified) + 5.0,
            1.0,
        ),
        Row::at_most(
            "firecracker_verified_page_by_page",
            "ms",
            of(2, |w| w.verified),
            of(1, |w| w.verified),
            0.35,
        ),
    ];
    println!("{:<34} {:>9} {:>9} {:>6} {:>7}", "ROW", "DORMOUSE", "OTHER", "RATIO", "TARGET");
    for row in rows {
        let target = row.target.map_or("-".to_owned(), |t| t.to_string());
        println!("{:<34} {:>9.1} {:>9.1} {:>6.2} {target:>7}", row.name, row.value, row.floor, row.ratio);
    }
}
