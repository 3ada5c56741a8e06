//! A store, and VMs of the peer's that sleep in it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dormouse_chunkstore::{ImportReport, ImportRequest, NoProgress, Store, StoreOptions};
use dormouse_cloud_hypervisor::{
    FaultServer, ReceiveError, Received, SendError, StoredVm, WakeError, WakeOptions, Wire, receive, send,
    wake_eagerly, wake_on_demand,
};
use dormouse_core::Name;
use dormouse_restore::{Retry, Uffd, UffdOptions};

use super::peer::{Awake, OK, Receive, Refused, Slot, Vm, receive_at};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PAGE: u64 = 4096;
/// Two slots, as of a VM with memory above 4 GiB.
pub(crate) const SLOTS: [Slot; 2] = [
    Slot { slot: 0, gpa: 0, bytes: 3 << 20, file_offset: 0 },
    Slot { slot: 2, gpa: 4 << 30, bytes: 1 << 20, file_offset: 0 },
];
pub(crate) const PAGES: u64 = 1024;

pub(crate) struct Scene {
    directory: tempfile::TempDir,
    pub(crate) store: Store,
}

/// Whether the peer can have a userfaultfd here. Says so if not; fails if it must.
pub(crate) fn have_uffd() -> bool {
    let required = std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_some_and(|v| v == "1");
    let why = Uffd::create(UffdOptions { remove_events: false, kernel_faults: false }).err();
    if let Some(why) = why {
        assert!(!required, "DORMOUSE_REQUIRE_UFFD=1, but: {why}");
        dormouse_testkit::skipped!("{why}");
        return false;
    }
    true
}

pub(crate) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Gives up on a page quickly, and fetches what is asked for only.
pub(crate) fn bare() -> WakeOptions {
    WakeOptions { prefetch: false, retry: Retry { limit: 2, ..Retry::default() }, ..Default::default() }
}

impl Scene {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store").to_str().unwrap(), StoreOptions::default());
        Scene { store: store.unwrap(), directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn import(&self, called: &str, parent: Option<&str>, received: &Received) -> ImportReport {
        let (images, blobs) = received.parts().unwrap();
        let parent = parent.map(name);
        let request = ImportRequest { parent, images, blobs, ..ImportRequest::new(name(called)) };
        self.store.import(&request, &NoProgress).unwrap()
    }

    /// Puts `vm` on standby as `called`; the peer was told so only when it was stored.
    pub(crate) fn sleep(&self, vm: &Vm, called: &str, parent: Option<&str>) -> ImportReport {
        let (near, far) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| vm.send(&near, true));
            let received = receive(far, own_uid(), PATIENCE).unwrap();
            let report = self.import(called, parent, &received);
            assert!(!sending.is_finished(), "the VMM ends only when all is stored");
            assert!(received.was_running);
            received.acknowledge().unwrap();
            assert_eq!(sending.join().unwrap().unwrap(), OK);
            report
        })
    }

    pub(crate) fn stored(&self, called: &str) -> StoredVm {
        StoredVm::open(&self.store.open_snapshot(&name(called)).unwrap()).unwrap()
    }

    /// Wakes `called` on demand in a peer that receives as in `how`.
    pub(crate) fn wake(
        &self,
        called: &str,
        how: Receive,
        options: WakeOptions,
    ) -> (Result<FaultServer, WakeError>, Result<Awake, Refused>) {
        self.wake_vm(&self.stored(called), how, options)
    }

    /// The same, of a VM that was read before.
    pub(crate) fn wake_vm(
        &self,
        vm: &StoredVm,
        how: Receive,
        options: WakeOptions,
    ) -> (Result<FaultServer, WakeError>, Result<Awake, Refused>) {
        let socket = tempfile::Builder::new().tempdir_in(self.directory.path()).unwrap();
        let path = socket.path().join("receive.sock");
        let peer = receive_at(&path, how);
        let connect =
            || -> Result<Wire, SendError> { send::connect(&path, own_uid(), PATIENCE, PATIENCE, || false) };
        let woken = wake_on_demand(vm, connect, true, options, &mut |_| {});
        (woken, peer.join().unwrap())
    }

    pub(crate) fn wake_eagerly(&self, called: &str) -> Awake {
        let socket = tempfile::Builder::new().tempdir_in(self.directory.path()).unwrap();
        let path = socket.path().join("receive.sock");
        let peer = receive_at(&path, Receive { postcopy: false, prefault: false });
        let connect = || send::connect(&path, own_uid(), PATIENCE, PATIENCE, || false);
        wake_eagerly(&self.stored(called), connect, false, &NoProgress, &mut |_| {}).unwrap();
        peer.join().unwrap().unwrap()
    }
}

/// What a receiver makes of a peer that does `what`.
pub(crate) fn received_from(
    patience: Duration,
    what: impl FnOnce(UnixStream) + Send,
) -> Result<Received, ReceiveError> {
    let (near, far) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || what(near));
        receive(far, own_uid(), patience)
    })
}

/// Waits for what must come about, but not for ever.
pub(crate) fn until(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
