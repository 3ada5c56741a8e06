//! A store in a temporary directory, and machines that sleep in it.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use dormouse_chunkstore::backend::{faulty::FaultyBackend, open_url};
use dormouse_chunkstore::{Store, StoreOptions};
use dormouse_core::{ImageId, Name};
use dormouse_embed::{self as embed, Install, Prefetch, Sleep, Template, Wake, Woken};
use dormouse_guest::native::NativeGuest;
use dormouse_guest::{Command, Guest, GuestParams, park_and_pause};
use dormouse_minivm::{Dirty, MiniVm, VmShell};
use dormouse_restore::{CountersSnapshot, FailClosed, Policy, Uffd, UffdOptions, VmStopped};
use tempfile::TempDir;
use vm_memory::GuestAddress;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PAGES: u64 = 1024;
/// The pattern lies across both: it starts at 16 MiB, and only 2 MiB more are low.
pub(crate) const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 18 << 20), (GuestAddress(4 << 30), 6 << 20)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Kvm,
    Process,
}

/// Whether machines can be woken on `host` here. Says so if not; fails if they must be.
pub(crate) fn have(host: Host) -> bool {
    let required = |variable: &str| std::env::var_os(variable).is_some_and(|v| v == "1");
    let kvm = host == Host::Kvm;
    if kvm && let Err(why) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        assert!(!required("DORMOUSE_REQUIRE_KVM"), "DORMOUSE_REQUIRE_KVM=1, but /dev/kvm: {why}");
        dormouse_testkit::skipped!("/dev/kvm cannot be opened: {why}");
        return false;
    }
    if let Err(why) = Uffd::create(UffdOptions { remove_events: false, kernel_faults: kvm }) {
        assert!(!required("DORMOUSE_REQUIRE_UFFD"), "DORMOUSE_REQUIRE_UFFD=1, but: {why}");
        dormouse_testkit::skipped!("{why}");
        return false;
    }
    true
}

/// Waits for what must come about, but not for ever.
pub(crate) fn until(what: &str, is: impl Fn() -> bool) {
    for _ in 0..PATIENCE.as_millis() {
        if is() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("waited in vain for {what}");
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

pub(crate) fn state_id() -> ImageId {
    ImageId::new("vcpu").expect("an id")
}

pub(crate) struct Bed {
    host: Host,
    /// Whether a sample is held out of resume streams.
    pub(crate) sample: bool,
    directory: TempDir,
    pub(crate) store: Store,
}

type Withheld = Arc<Mutex<Option<String>>>;

impl Bed {
    pub(crate) fn new(host: Host) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Store::open(directory.path().to_str().expect("UTF-8"), StoreOptions::default());
        Bed { host, sample: false, directory, store: store.expect("a store") }
    }

    /// Over a store that is far away, on a host with a disk of its own.
    pub(crate) fn far(host: Host) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let far = Arc::new(FaultyBackend::counting(open_url("memory://").expect("a store")));
        let options = StoreOptions { cache_dir: Some(directory.path().join("host")), ..Default::default() };
        Bed { host, sample: false, directory, store: Store::with_backend(far, options) }
    }

    /// Boots a machine and puts it on standby as `called`.
    pub(crate) fn boot(&self, called: &str) {
        let params = GuestParams::new(PAGES, 77).expect("valid");
        let memory = embed::memory(&REGIONS).expect("memory");
        let mut guest: Box<dyn Guest> = match self.host {
            Host::Kvm => {
                let shell = VmShell::create().expect("KVM");
                Box::new(MiniVm::boot(shell, memory.clone(), &params, Dirty::Untracked).expect("boot"))
            }
            Host::Process => Box::new(NativeGuest::boot(memory.clone(), &params, false).expect("boot")),
        };
        guest.resume().expect("start");
        guest.console().wait_for(b'.', 1, PATIENCE).expect("verified");
        park_and_pause(&mut *guest, PATIENCE).expect("park");
        let sleep = Sleep::new(name(called)).state(state_id(), guest.save_state().expect("state"));
        let report = sleep.store(&self.store, &memory).expect("sleep");
        assert_eq!(report.logical_bytes, 24 << 20);
    }

    /// How to wake, and where it is noted if a page has to be withheld.
    pub(crate) fn how(&self, prefetch: Prefetch) -> (Wake, Withheld) {
        let withheld = Withheld::default();
        let note = Arc::clone(&withheld);
        let kill = FailClosed::Kill(Arc::new(move |error| {
            note.lock().expect("a lock").get_or_insert(error.to_string());
        }));
        let policy = Policy { fail_closed: kill, ..Policy::default() };
        // Where blocks are moved, not every wake holds pages out.
        let install = if self.sample { Install::Copy } else { Install::Move };
        (
            Wake {
                prefetch,
                policy,
                kvm: self.host == Host::Kvm,
                sample: self.sample,
                install,
                ..Wake::default()
            },
            withheld,
        )
    }

    pub(crate) fn wake(&self, called: &str, prefetch: Prefetch) -> Awake {
        self.wake_with(called, prefetch, Command::Answer)
    }

    pub(crate) fn wake_with(&self, called: &str, prefetch: Prefetch, command: Command) -> Awake {
        let mut awake = self.assemble(called, prefetch);
        awake.guest.send(command);
        awake.guest.resume().expect("run");
        awake
    }

    /// Lets it run only when what is prefetched is in place.
    pub(crate) fn wake_filled(&self, called: &str, prefetch: Prefetch) -> Awake {
        let mut awake = self.assemble(called, prefetch);
        for _ in 0..10_000 {
            if awake.woken.restore().counters().prefetched_pages >= PAGES {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // The last runs may hold pages of other kinds than the pattern's.
        let settled = |w: &Woken| w.restore().counters().prefetched_pages;
        let mut before = 0;
        while before != settled(&awake.woken) {
            before = settled(&awake.woken);
            thread::sleep(Duration::from_millis(50));
        }
        awake.guest.send(Command::Answer);
        awake.guest.resume().expect("run");
        awake
    }

    fn assemble(&self, called: &str, prefetch: Prefetch) -> Awake {
        let resume = self.store.open_resume(&name(called)).expect("stored");
        let snapshot = resume.snapshot.clone();
        let (how, withheld) = self.how(prefetch);
        let woken = match resume.stream {
            Some(_) => embed::wake_resume(resume, &REGIONS, how),
            None => embed::wake(&snapshot, &REGIONS, how),
        };
        self.assembled(woken.expect("wake"), &snapshot.read_blob("vcpu").expect("state"), withheld)
    }

    /// Wakes a machine of a template, and lets it run.
    pub(crate) fn wake_from(&self, template: &Template, prefetch: Prefetch) -> Awake {
        let (how, withheld) = self.how(prefetch);
        let woken = template.wake(&REGIONS, how).expect("wake");
        let mut awake = self.assembled(woken, &template.state("vcpu").expect("state"), withheld);
        awake.guest.send(Command::Answer);
        awake.guest.resume().expect("run");
        awake
    }

    fn assembled(&self, woken: Woken, state: &[u8], withheld: Withheld) -> Awake {
        let memory = woken.memory().clone();
        let guest: Box<dyn Guest> = match self.host {
            Host::Kvm => {
                let shell = VmShell::create().expect("KVM");
                Box::new(MiniVm::restore(shell, memory, state, Dirty::Tracked).expect("restore"))
            }
            Host::Process => {
                let params = GuestParams::new(PAGES, 77).expect("valid");
                Box::new(NativeGuest::restore(memory, &params, state, true).expect("restore"))
            }
        };
        Awake { guest, woken, withheld }
    }

    /// Flips a bit in the middle of each frame of pages, as far as 4 KiB steps hit them. Page maps, device
    /// state and footers, which a waking machine must have, are in packs of their own or at the end.
    pub(crate) fn damage_pages(&self) {
        let mut packs = Vec::new();
        files(self.directory.path(), &mut packs);
        packs.retain(|p| p.to_string_lossy().contains("pack"));
        let largest = packs.iter().max_by_key(|p| p.metadata().expect("a file").len()).expect("a pack");
        let mut bytes = std::fs::read(largest).expect("read");
        let end = bytes.len() / 2;
        for at in (256..end).step_by(64) {
            bytes[at] ^= 1;
        }
        std::fs::write(largest, bytes).expect("write");
    }
}

fn files(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

pub(crate) struct Awake {
    // Before the memory it runs on.
    pub(crate) guest: Box<dyn Guest>,
    pub(crate) woken: Woken,
    withheld: Withheld,
}

impl Awake {
    /// Waits until the guest has verified all its pages, and found them right.
    pub(crate) fn verified(&self) {
        let console = self.guest.console();
        console.wait_for(b'.', 1, PATIENCE).unwrap_or_else(|e| panic!("{e}; {:?}", self.withheld));
        let wrong = (console.count(b'X'), console.count(b'x'), console.wrong_total());
        assert_eq!(wrong, (0, 0, 0), "{}", console.text());
        assert!(self.woken.restore().failures().is_empty());
    }

    /// Waits until a page has had to be withheld; why.
    pub(crate) fn withheld(&self) -> String {
        for _ in 0..PATIENCE.as_millis() / 10 {
            if let Some(why) = self.withheld.lock().expect("a lock").clone() {
                return why;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("no page was withheld; the guest said {:?}", self.guest.console().text());
    }

    pub(crate) fn end(self) -> CountersSnapshot {
        let Self { guest, woken, .. } = self;
        // A process guest blocked on a page that never comes cannot be stopped: it stays, and its memory too.
        if self.withheld.lock().expect("a lock").is_some() {
            std::mem::forget(guest);
            return woken.restore().counters();
        }
        drop(guest);
        woken.end(VmStopped::attest())
    }
}
