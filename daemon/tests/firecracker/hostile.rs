//! Peers of the socket for memory that mean harm or know no better. Each is told of by name, and a VM served beside
//! them is not disturbed. They all are this process, with memory of its own; so the policy is to hold.

use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse_firecracker::{HandshakeListener, accept_handshake};
use dormouse_restore::{Mapping, PageSize, Uffd, UffdError, UffdOptions};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use crate::scene::{PATIENCE, Scene, wait_until};
use crate::served::Served;

const PAGES: u64 = 2048;
const BYTES: u64 = PAGES * 4096;

fn word(page: u64) -> u64 {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Memory that waits for its pages.
struct Guarded {
    uffd: Uffd,
    mapping: Arc<Mapping>,
}

impl Guarded {
    /// `pages` pages, of which the first `registered` are guarded. `None` after saying that the test is skipped.
    fn new(pages: u64, registered: Registered) -> Option<Self> {
        let uffd = match Uffd::create(UffdOptions { kernel_faults: false, ..UffdOptions::default() }) {
            Ok(uffd) => uffd,
            Err(error @ (UffdError::NotPermitted(_) | UffdError::Missing(_))) => {
                assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {error}");
                dormouse_testkit::skipped!("{error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let mapping = Arc::new(Mapping::new(pages, PageSize::Small).unwrap());
        if registered == Registered::All {
            uffd.register(&mapping).unwrap();
        }
        Some(Guarded { uffd, mapping })
    }

    fn regions(&self) -> String {
        region(self.mapping.addr(), self.mapping.bytes() as u64, 0, 4096)
    }

    fn come_to(&self, socket: &Path) -> UnixStream {
        come(socket, self.regions().as_bytes(), &[self.uffd.as_fd()])
    }

    fn verify(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            assert_eq!(self.mapping.load(page as usize * 4096), Some(word(page)), "page {page} is wrong");
        }
    }
}

#[derive(PartialEq)]
enum Registered {
    All,
    Nothing,
}

fn region(host: u64, size: u64, offset: u64, page_size: u64) -> String {
    json!([{"base_host_virt_addr": host, "size": size, "offset": offset, "page_size": page_size}]).to_string()
}

/// A peer that says this, with these descriptors, and stays.
fn come(socket: &Path, message: &[u8], fds: &[BorrowedFd<'_>]) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = rustix::net::sendmsg(&stream, &[IoSlice::new(message)], &mut ancillary, SendFlags::empty());
    assert_eq!(sent.unwrap(), message.len());
    stream
}

struct Sockets {
    scene: Scene,
    daemon: Served,
    /// For who fetches each page when it is touched, and for who gets all of them.
    on_demand: PathBuf,
    at_once: PathBuf,
}

/// A daemon with the memory of `PAGES` pages at two sockets.
fn sockets() -> Sockets {
    let scene = Scene::bare();
    let memory: Vec<u8> = (0..PAGES).flat_map(|page| word(page).to_le_bytes().repeat(512)).collect();
    std::fs::write(scene.path("memory"), memory).unwrap();
    scene.done("host", &["import", "vm", "--memory", &scene.text("memory")]);
    let daemon = Served::start(&scene, &[]);
    let [on_demand, at_once] = [false, true].map(|prefetch| {
        let socket = scene.path(if prefetch { "at-once" } else { "on-demand" });
        let request = json!({"snapshot": "vm", "socket": socket, "policy": "hold", "prefetch": prefetch});
        daemon.post("/v1/listeners", &request);
        socket
    });
    Sockets { scene, daemon, on_demand, at_once }
}

impl Sockets {
    /// Waits until something of this is logged.
    fn told(&self, part: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.logged().iter().any(|line| line.contains(part)) {
            assert!(Instant::now() < deadline, "{part:?} was not logged: {:#?}", self.logged());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn logged(&self) -> Vec<String> {
        self.daemon.logged().iter().map(|line| line["fields"].to_string()).collect()
    }

    fn listener(&self, socket: &Path) -> Value {
        let listeners = self.daemon.get("/v1/listeners");
        let all = listeners["listeners"].as_array().unwrap();
        all.iter().find(|l| l["socket"].as_str() == socket.to_str()).unwrap().clone()
    }
}

#[test]
fn peers_that_say_or_send_what_makes_no_sense_are_named_and_disturb_nobody() {
    let Some(good) = Guarded::new(PAGES, Registered::All) else { return };
    let sockets = sockets();
    let _good = good.come_to(&sockets.on_demand);
    good.verify(0..PAGES / 2);

    let fake = Guarded::new(PAGES, Registered::All).unwrap();
    let (at, uffd) = (fake.mapping.addr(), fake.uffd.as_fd());
    let pipe = rustix::pipe::pipe().unwrap().0;
    let memfd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let list = |regions: &[String]| format!("[{}]", regions.join(",")).replace("[[", "[").replace("]]", "]");
    let two = |second: String| {
        let (first, second) = (region(at, BYTES, 0, 4096), second);
        list(&[first.trim_matches(['[', ']']).into(), second.trim_matches(['[', ']']).into()])
    };
    let fine = fake.regions();
    let too_long = " ".repeat(70_000);
    let peers: Vec<(&str, String, Vec<BorrowedFd<'_>>)> = vec![
        ("is not Firecracker's JSON", "GET / HTTP/1.1\r\n\r\n".into(), vec![uffd]),
        ("is not Firecracker's JSON", "[{\"base_host_virt_addr\":\"1\"".into(), vec![uffd]),
        ("the region list has 0 regions", "[]".into(), vec![uffd]),
        ("more than the 65536 allowed", too_long, vec![uffd]),
        ("overlap in memory", two(region(at + 4096, BYTES, BYTES, 4096)), vec![uffd]),
        ("overlap in the snapshot", two(region(at + BYTES, BYTES, 4096, 4096)), vec![uffd]),
        ("its address is not a multiple of its page size", region(at + 1, BYTES, 0, 4096), vec![uffd]),
        ("its size is not a multiple of its page size", region(at, BYTES - 1, 0, 4096), vec![uffd]),
        ("its offset is not a multiple of its page size", region(at, BYTES, 7, 4096), vec![uffd]),
        ("its size is zero", region(at, 0, 0, 4096), vec![uffd]),
        ("neither 4 KiB nor 2 MiB", region(at, BYTES, 0, 8192), vec![uffd]),
        ("no process has such addresses", region(u64::MAX - 4095, 4096, 0, 4096), vec![uffd]),
        ("no snapshot has such an offset", region(at, BYTES, u64::MAX - 4095, 4096), vec![uffd]),
        (
            "8384512 bytes of memory, the snapshot's memory image has 8388608",
            region(at, BYTES - 4096, 0, 4096),
            vec![uffd],
        ),
        (
            "16777216 bytes of memory, the snapshot's memory image has 8388608",
            region(at, 2 * BYTES, 0, 4096),
            vec![uffd],
        ),
        ("do not fit the snapshot", region(at, BYTES, BYTES, 4096), vec![uffd]),
        ("0 descriptors came", fine.clone(), vec![]),
        ("2 descriptors came", fine.clone(), vec![uffd, uffd]),
        (" descriptors came", fine.clone(), vec![uffd; 8]),
        ("not a userfaultfd", fine.clone(), vec![pipe.as_fd()]),
        ("memfd:memory", fine.clone(), vec![memfd.as_fd()]),
    ];
    let bad = peers.len() as u64;
    let staying: Vec<UnixStream> = peers
        .into_iter()
        .map(|(part, message, fds)| {
            let stream = come(&sockets.on_demand, message.as_bytes(), &fds);
            sockets.told(part);
            stream
        })
        .collect();
    // Some hang up: before they say anything, in the middle, and when all is said.
    drop(UnixStream::connect(&sockets.on_demand).unwrap());
    sockets.told("closed the connection after 0 bytes");
    drop(come(&sockets.on_demand, &fine.as_bytes()[..20], &[uffd]));
    sockets.told("closed the connection after 20 bytes");
    wait_until("all to be counted", || sockets.listener(&sockets.on_demand)["refused"] == bad + 2);
    assert_eq!(sockets.listener(&sockets.on_demand)["served"], 1);

    good.verify(PAGES / 2..PAGES);
    assert_eq!(sockets.daemon.get("/v1/health")["status"], "ok");
    drop(staying);
}

#[test]
fn a_userfaultfd_that_guards_other_memory_than_it_is_said_to_is_named_and_disturbs_nobody() {
    let Some(good) = Guarded::new(PAGES, Registered::All) else { return };
    let sockets = sockets();
    let _good = good.come_to(&sockets.on_demand);
    good.verify(0..PAGES / 2);

    let nothing = Guarded::new(PAGES, Registered::Nothing).unwrap();
    let _nothing = nothing.come_to(&sockets.at_once);
    sockets.told("region 0 is no longer registered");
    // Not a line for each of its pages, or a liar would fill the log.
    sockets.told("this VM's further failures are not told");
    let failed = sockets.logged().iter().filter(|line| line.contains("restore failed closed")).count();
    assert_eq!(failed, 16, "{:#?}", sockets.logged());

    // One that comes twice, and one of small pages that are said to be huge, only get their own memory.
    let twice = Guarded::new(PAGES, Registered::All).unwrap();
    let _twice = [twice.come_to(&sockets.on_demand), twice.come_to(&sockets.on_demand)];
    twice.verify(0..PAGES);
    let larger = Guarded::new(PAGES + 512, Registered::All).unwrap();
    let huge = larger.mapping.addr().next_multiple_of(2 << 20);
    let message = region(huge, BYTES, 0, 2 << 20);
    let _huge = come(&sockets.on_demand, message.as_bytes(), &[larger.uffd.as_fd()]);
    let skipped = (huge - larger.mapping.addr()) as usize;
    for page in 0..PAGES as usize {
        assert_eq!(
            larger.mapping.load(skipped + page * 4096),
            Some(word(page as u64)),
            "page {page} is wrong"
        );
    }
    good.verify(PAGES / 2..PAGES);
}

const CHILD_SOCKET: &str = "DORMOUSE_TEST_HOSTILE_CHILD";
const CHILD: &str = "hostile::child_whose_userfaultfd_somebody_else_hands_over";

/// The other process of the test below: hands its memory over, reads half of it, and waits to be killed. Without the
/// variable, nothing.
#[test]
fn child_whose_userfaultfd_somebody_else_hands_over() {
    let Some(socket) = std::env::var_os(CHILD_SOCKET) else { return };
    let own = Guarded::new(PAGES, Registered::All).unwrap();
    let mut connection = own.come_to(socket.as_ref());
    own.verify(0..PAGES / 2);
    connection.write_all(b"half").unwrap();
    let _ = connection.read(&mut [0]);
}

#[test]
fn a_userfaultfd_of_another_process_is_served_as_long_as_that_lives_and_disturbs_nobody() {
    let Some(good) = Guarded::new(PAGES, Registered::All) else { return };
    let sockets = sockets();
    let _good = good.come_to(&sockets.on_demand);
    good.verify(0..PAGES / 2);

    let between = HandshakeListener::bind(&sockets.scene.path("between")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CHILD])
        .env(CHILD_SOCKET, between.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut handed = accept_handshake(&between, PATIENCE).unwrap();
    let its = handed.regions[0];
    let message = region(its.host, its.bytes, its.offset, 4096);
    let hand_over = |socket: &Path| come(socket, message.as_bytes(), &[handed.uffd.as_fd()]);
    let _alive = hand_over(&sockets.on_demand);
    handed.connection.read_exact(&mut [0; 4]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let _dead = hand_over(&sockets.at_once);
    sockets.told("the VM is gone; its restore ends");

    good.verify(PAGES / 2..PAGES);
    assert_eq!(sockets.daemon.get("/v1/health")["status"], "ok");
}
