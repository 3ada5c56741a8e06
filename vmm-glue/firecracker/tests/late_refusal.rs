//! A VM whose restore cannot be started after it was handed to a keeper. Alone in its file, and so in its process: it
//! takes away the process's room for descriptors.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use dormouse_core::page::{PageCount, PageIndex};
use dormouse_firecracker::handshake::Peer;
use dormouse_firecracker::{Handshake, KeepWith, PageSize, Region, Session, SessionError, SessionOptions};
use dormouse_keeper::{KeepError, Keeper, KeptSnapshot, KeptVm, VmId};
use dormouse_restore::{
    DecodedFrame, Extent, FrameToken, Mapping, PageSource, SourceError, SourceErrorKind, Uffd, UffdOptions,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const PAGES: u64 = 16;

#[derive(Debug)]
struct Zeros;

impl PageSource for Zeros {
    fn page_count(&self) -> PageCount {
        PageCount(PAGES)
    }
    fn locate(&self, _: PageIndex) -> Result<Extent, SourceError> {
        Ok(Extent::zero(PageIndex(0), PAGES))
    }
    fn fetch(&self, _: FrameToken) -> Result<DecodedFrame, SourceError> {
        Err(SourceError::new(SourceErrorKind::Gone, "there are only zeros"))
    }
}

/// Keeps what it is given, after which the process can open nothing any more.
#[derive(Debug, Default)]
struct Last {
    kept: Mutex<Vec<VmId>>,
    released: Mutex<Vec<VmId>>,
}

impl Keeper for Last {
    fn keep(&self, vm: &KeptVm) -> Result<(), KeepError> {
        self.kept.lock().unwrap().push(vm.record.id.clone());
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..getrlimit(Resource::Nofile) }).unwrap();
        Ok(())
    }
    fn release(&self, id: &VmId) -> Result<(), KeepError> {
        self.released.lock().unwrap().push(id.clone());
        Ok(())
    }
    fn take_all(&self) -> Result<Vec<KeptVm>, KeepError> {
        Ok(Vec::new())
    }
}

/// It was neither released nor handed back to be ended, and so waited for ever, here and after the next start.
#[test]
fn a_vm_that_is_refused_after_it_was_kept_is_released_and_its_process_handed_back() {
    let uffd = match Uffd::create(UffdOptions { remove_events: true, kernel_faults: false }) {
        Ok(uffd) => uffd,
        Err(why) => {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {why}");
            return dormouse_testkit::skipped!("{why}");
        }
    };
    let mapping = Arc::new(Mapping::new(PAGES, dormouse_restore::PageSize::Small).unwrap());
    let _registered = uffd.register(&mapping).unwrap();
    let (connection, _firecracker) = UnixStream::pair().unwrap();
    let pid = i32::try_from(std::process::id()).unwrap();
    let region = Region { host: mapping.addr(), bytes: PAGES * 4096, offset: 0, page_size: PageSize::Small };
    let handshake = Handshake {
        uffd: uffd.try_clone_fd().unwrap(),
        regions: vec![region],
        peer: Peer { pid, uid: rustix::process::getuid().as_raw() },
        connection,
    };
    let snapshot = serde_json::json!({"name": "vm", "snapshot": "5a".repeat(32), "reference": "00"});
    let snapshot: KeptSnapshot = serde_json::from_value(snapshot).unwrap();
    let last = Arc::new(Last::default());
    let keep = KeepWith { keeper: last.clone(), snapshot, api_socket: None, notes: Default::default() };
    let room = getrlimit(Resource::Nofile);
    let refused = Session::start_kept(handshake, Arc::new(Zeros), SessionOptions::default(), keep);
    setrlimit(Resource::Nofile, room).unwrap();
    let refusal = *refused.expect_err("nothing can be opened");
    assert!(matches!(refusal.error, SessionError::Start(_)), "{refusal:?}");
    assert_eq!(refusal.process.expect("somebody has to end it").peer().pid, pid);
    let kept = last.kept.lock().unwrap();
    assert_eq!((kept.len(), &*kept), (1, &*last.released.lock().unwrap()));
}
