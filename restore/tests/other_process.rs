//! The memory of another process, whose userfaultfd came over a socket, as from a VMM.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::sync::Arc;

use common::{TestImage, uffd_or_skip, verify};
use dormouse_core::page::{PageCount, PageIndex};
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::{
    Mapping, Memory, PageSize, PageSource, Plan, Policy, RegionSpec, Restore, RestoreError, UffdError,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

const PAGES: u64 = 4096;
const SOCKET: &str = "DORMOUSE_TEST_SOCKET";

fn image() -> TestImage {
    TestImage::mixed(PAGES, 21)
}

/// The other process: registers memory, sends its descriptor, then does as it is told.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn child_has_memory() {
    let mut socket = UnixStream::connect(std::env::var(SOCKET).unwrap()).unwrap();
    let uffd = uffd_or_skip().unwrap();
    let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let fd = memory.uffd().as_fd();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let address = mapping.addr().to_ne_bytes();
    sendmsg(&socket, &[IoSlice::new(&address)], &mut control, SendFlags::empty()).unwrap();

    let image = image();
    let mut order = [0u8; 1];
    while socket.read_exact(&mut order).is_ok() {
        match order[0] {
            b'v' => (0..PAGES).for_each(|p| verify(&image, &mapping, p)),
            b'd' => {
                mapping.discard(0, 10).unwrap();
                (0..10).for_each(|p| assert_eq!(mapping.load(p as usize * 4096), Some(0)));
            }
            b'q' => std::process::exit(3),
            _ => panic!("unknown order"),
        }
        socket.write_all(b"k").unwrap();
    }
    // The parent is gone or failed.
    std::process::exit(4);
}

struct Peer {
    child: Child,
    socket: UnixStream,
    fd: Option<OwnedFd>,
    address: u64,
}

impl Peer {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_has_memory", "--ignored", "--nocapture"])
            .env(SOCKET, &path)
            .spawn()
            .unwrap();
        let (socket, _) = listener.accept().unwrap();
        let mut address = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&socket, &mut [IoSliceMut::new(&mut address)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .unwrap();
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Peer { child, socket, fd, address: u64::from_ne_bytes(address) }
    }

    fn memory(&mut self) -> Memory {
        let region =
            AnnouncedRegion { address: self.address, bytes: PAGES * 4096, page_size: PageSize::Small };
        Memory::adopt(self.fd.take().unwrap(), &[region]).unwrap()
    }

    fn tell(&mut self, order: u8) {
        self.socket.write_all(&[order]).unwrap();
    }

    fn done(&mut self) {
        let mut answer = [0; 1];
        self.socket.read_exact(&mut answer).expect("the other process failed");
    }

    fn quit(&mut self) {
        self.tell(b'q');
        assert_eq!(self.child.wait().unwrap().code(), Some(3));
    }
}

fn plan(image: &Arc<TestImage>) -> Plan {
    let region =
        RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
    Plan::new(image.clone(), &[region]).unwrap()
}

#[test]
fn another_process_finds_every_page_right_also_after_detach() {
    if uffd_or_skip().is_none() {
        return;
    }
    let (mut peer, image) = (Peer::start(), Arc::new(image()));
    let handle = Restore::start(plan(&image), peer.memory(), Policy::default()).unwrap();
    peer.tell(b'v');
    peer.done();
    let counts = handle.counters();
    assert_eq!(counts.fetches, image.frames());
    assert!(handle.ended().is_none());
    peer.tell(b'd');
    peer.done();
    assert_eq!(handle.detach().unwrap().removes, 1);
    peer.quit();
}

#[test]
fn detach_while_another_process_runs_leaves_it_whole() {
    if uffd_or_skip().is_none() {
        return;
    }
    let (mut peer, image) = (Peer::start(), Arc::new(image()));
    let handle = Restore::start(plan(&image), peer.memory(), Policy::default()).unwrap();
    peer.tell(b'v');
    handle.detach().unwrap();
    peer.done();
    peer.tell(b'v');
    peer.done();
    peer.quit();
}

#[test]
fn the_death_of_the_other_process_ends_its_restore() {
    if uffd_or_skip().is_none() {
        return;
    }
    let (mut peer, image) = (Peer::start(), Arc::new(image()));
    let handle = Restore::start(plan(&image), peer.memory(), Policy::default()).unwrap();
    handle.install_run(PageIndex(0), &image.bytes(0, 100)).unwrap();
    peer.quit();
    assert!(matches!(handle.install_run(PageIndex(100), &image.bytes(100, 100)), Err(RestoreError::VmGone)));
    handle.fill_all();
    assert!(matches!(*handle.wait_filled().unwrap_err(), RestoreError::VmGone));
    assert!(matches!(handle.ended().as_deref(), Some(RestoreError::VmGone)));
}

#[test]
fn the_death_of_a_quiet_process_is_noticed() {
    if uffd_or_skip().is_none() {
        return;
    }
    let (mut peer, image) = (Peer::start(), Arc::new(image()));
    let handle = Restore::start(plan(&image), peer.memory(), Policy::default()).unwrap();
    peer.quit();
    assert!(matches!(*handle.wait_filled().unwrap_err(), RestoreError::VmGone));
}

#[test]
fn a_peer_that_lies_is_told_so() {
    if uffd_or_skip().is_none() {
        return;
    }
    let other = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Memory::adopt(other.into(), &[]), Err(UffdError::NotUffd { .. })));
    let uffd = uffd_or_skip().unwrap();
    let fd = || uffd.as_fd().try_clone_to_owned().unwrap();
    let region = |address, bytes| AnnouncedRegion { address, bytes, page_size: PageSize::Small };
    for bad in [region(4096, 0), region(1, 4096), region(4096, 100), region(u64::MAX - 4095, 8192)] {
        assert!(matches!(Memory::adopt(fd(), &[bad]), Err(UffdError::BadRange { .. })), "{bad:?}");
    }
    let overlapping = [region(0x10000, 0x3000), region(0x1000, 0x10000)];
    assert!(matches!(Memory::adopt(fd(), &overlapping), Err(UffdError::Overlap { .. })));
    // Memory it never registered: found out at the first install.
    let image = Arc::new(image());
    assert_eq!(image.page_count(), PageCount(PAGES));
    let memory = Memory::adopt(fd(), &[region(0x7000_0000, PAGES * 4096)]).unwrap();
    let handle = Restore::start(plan(&image), memory, Policy::default()).unwrap();
    let refused = handle.install_run(PageIndex(0), &image.bytes(0, 1));
    assert!(matches!(refused, Err(RestoreError::RegionGone { region: 0 })), "{refused:?}");
    handle.stop(dormouse_restore::VmStopped::attest());
}
