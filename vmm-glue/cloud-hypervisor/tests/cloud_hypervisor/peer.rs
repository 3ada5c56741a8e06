//! Cloud Hypervisor's part of the offload protocol, written from its documents and nothing of this crate's:
//! `vm-migration/src/protocol.rs`, `docs/snapshot_restore.md` and the fault handler in `vmm/src/memory_manager.rs`.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::sys::{Guard, Mapped};

pub(crate) const START: u16 = 1;
pub(crate) const CONFIG: u16 = 2;
pub(crate) const STATE: u16 = 3;
pub(crate) const COMPLETE: u16 = 5;
pub(crate) const ABANDON: u16 = 6;
pub(crate) const MEMORY_FD: u16 = 7;
pub(crate) const COMPLETE_PAUSED: u16 = 8;
pub(crate) const PAGE_FAULT: u16 = 9;
pub(crate) const OK: u16 = 1;
const PAGE: u64 = 4096;

/// A memory slot of the peer's VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) slot: u32,
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
    pub(crate) file_offset: u64,
}

/// The word at `offset` of a guest's memory. About a third of the pages are zero.
pub(crate) fn word(gpa: u64, seed: u64) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    // Runs of eight pages are zero or not.
    if mix(seed ^ (gpa / PAGE / 8)).is_multiple_of(3) { 0 } else { mix(seed.wrapping_add(gpa)) | 1 }
}

/// The configuration of a VM with these slots, as serde writes `VmMigrationConfig`.
pub(crate) fn config(slots: &[Slot]) -> Vec<u8> {
    let mapping = |s: &Slot| {
        serde_json::json!({
            "slot": s.slot, "gpa": s.gpa, "size": s.bytes, "zone_id": "mem0", "virtio_mem": false,
            "file_offset": s.file_offset,
        })
    };
    let mappings: Vec<_> = slots.iter().map(mapping).collect();
    serde_json::to_vec(&serde_json::json!({
        "vm_config": {"memory": {"size": 0, "shared": true}, "disks": [{"path": "/x", "vhost_user": false}]},
        "common_cpuid": [],
        "memory_manager_data": {"guest_ram_mappings": mappings},
    }))
    .unwrap()
}

pub(crate) fn request(command: u16, length: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..2].copy_from_slice(&command.to_le_bytes());
    head[8..].copy_from_slice(&length.to_le_bytes());
    head
}

/// The status of the next answer.
pub(crate) fn answer(mut stream: &UnixStream) -> io::Result<u16> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    assert_eq!(head[2..], [0; 14], "an answer has no payload here");
    Ok(u16::from_le_bytes([head[0], head[1]]))
}

pub(crate) fn ask(mut stream: &UnixStream, command: u16, payload: &[u8]) -> io::Result<u16> {
    stream.write_all(&request(command, payload.len() as u64))?;
    stream.write_all(payload)?;
    answer(stream)
}

pub(crate) fn send_fds(stream: &UnixStream, slot: u32, files: &[std::os::fd::BorrowedFd<'_>]) {
    let number = slot.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(files)));
    }
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(stream, &[IoSlice::new(&number)], &mut ancillary, flags).unwrap();
}

pub(crate) fn ask_memory_fd(mut stream: &UnixStream, slot: u32, file: &File) -> io::Result<u16> {
    stream.write_all(&request(MEMORY_FD, 4))?;
    send_fds(stream, slot, &[file.as_fd()]);
    answer(stream)
}

pub(crate) fn memfd(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("ch_ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// A VM that runs in the peer: slots, each with the file that shows it.
pub(crate) struct Vm {
    pub(crate) slots: Vec<(Slot, Arc<File>)>,
    pub(crate) state: Vec<u8>,
}

impl Vm {
    /// A VM whose memory holds [`word`] of `seed`, a file for each slot; or one for all, where they have offsets.
    pub(crate) fn new(slots: &[Slot], seed: u64) -> Self {
        let end = slots.iter().map(|s| s.file_offset + s.bytes).max().unwrap();
        let one = slots.iter().any(|s| s.file_offset > 0).then(|| Arc::new(memfd(end)));
        let file = |s: &Slot| one.clone().unwrap_or_else(|| Arc::new(memfd(s.bytes)));
        let slots: Vec<_> = slots.iter().map(|s| (*s, file(s))).collect();
        for (slot, file) in &slots {
            for page in (0..slot.bytes).step_by(PAGE as usize).filter(|page| word(slot.gpa + page, seed) != 0)
            {
                let words =
                    (0..PAGE).step_by(8).flat_map(|at| word(slot.gpa + page + at, seed).to_le_bytes());
                file.write_all_at(&words.collect::<Vec<u8>>(), slot.file_offset + page).unwrap();
            }
        }
        Vm { slots, state: format!("{{\"id\":\"vm\",\"seed\":{seed}}}").into_bytes() }
    }

    pub(crate) fn config(&self) -> Vec<u8> {
        config(&self.slots.iter().map(|(s, _)| *s).collect::<Vec<_>>())
    }

    /// Goes to sleep: the whole of `send-migration local=on`. The last answer.
    pub(crate) fn send(&self, stream: &UnixStream, running: bool) -> io::Result<u16> {
        let good = |status| if status == OK { Ok(()) } else { Err(io::Error::other("refused")) };
        good(ask(stream, START, &[])?)?;
        for (slot, file) in &self.slots {
            good(ask_memory_fd(stream, slot.slot, file)?)?;
        }
        good(ask(stream, CONFIG, &self.config())?)?;
        good(ask(stream, STATE, &self.state)?)?;
        ask(stream, if running { COMPLETE } else { COMPLETE_PAUSED }, &[])
    }
}

/// How the peer receives a VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Receive {
    /// `memory_mode=postcopy`.
    pub(crate) postcopy: bool,
    /// Whether the handler asks for all pages when no fault waits, as Cloud Hypervisor's does.
    pub(crate) prefault: bool,
}

struct Region {
    slot: Slot,
    memory: Mapped,
    file: File,
}

/// A VM that was received. The guest's accesses go through [`Awake::load`], which waits for absent pages.
pub(crate) struct Awake {
    regions: Arc<Vec<Region>>,
    pub(crate) state: Vec<u8>,
    pub(crate) ran: bool,
    requests: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    faults: Option<UnixStream>,
    handler: Option<JoinHandle<io::Result<()>>>,
}

impl Awake {
    fn region(&self, gpa: u64) -> &Region {
        let holds = |r: &&Region| (r.slot.gpa..r.slot.gpa + r.slot.bytes).contains(&gpa);
        self.regions.iter().find(holds).unwrap()
    }

    pub(crate) fn load(&self, gpa: u64) -> u64 {
        let region = self.region(gpa);
        region.memory.load(gpa - region.slot.gpa)
    }

    pub(crate) fn store(&self, gpa: u64, value: u64) {
        let region = self.region(gpa);
        region.memory.store(gpa - region.slot.gpa, value);
    }

    /// Gives a page back, as a balloon does.
    pub(crate) fn give_back(&self, gpa: u64) {
        let region = self.region(gpa);
        super::sys::punch(&region.file, region.slot.file_offset + gpa - region.slot.gpa, PAGE);
    }

    /// Bytes that the memory files take up.
    pub(crate) fn held_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut files: Vec<_> = self.regions.iter().map(|r| r.file.metadata().unwrap()).collect();
        files.dedup_by_key(|f| f.ino());
        files.iter().map(|f| f.blocks() * 512).sum()
    }

    /// The memory as another VM's, once this one is shut down.
    pub(crate) fn take_memory(self) -> Vec<(Slot, Arc<File>)> {
        self.memory()
    }

    /// The same, as it is now.
    pub(crate) fn memory(&self) -> Vec<(Slot, Arc<File>)> {
        self.regions.iter().map(|r| (r.slot, Arc::new(r.file.try_clone().unwrap()))).collect()
    }

    /// Compares each byte with [`word`] of `seed`; pages of a slot in an order of its own.
    pub(crate) fn verify(&self, seed: u64) {
        self.verify_but(seed, None);
    }

    /// [`Awake::verify`], but for the word at `changed`.
    pub(crate) fn verify_but(&self, seed: u64, changed: Option<u64>) {
        for region in self.regions.iter() {
            let pages = region.slot.bytes / PAGE;
            // Coprime to any number of pages used here, so that each comes once.
            for page in (0..pages).map(|n| n * 7919 % pages) {
                for at in (0..PAGE).step_by(8) {
                    let gpa = region.slot.gpa + page * PAGE + at;
                    if Some(gpa) != changed {
                        assert_eq!(self.load(gpa), word(gpa, seed), "a wrong byte at {gpa:#x}");
                    }
                }
            }
        }
    }

    /// Whether nobody answers faults any more.
    pub(crate) fn handler_ended(&self) -> bool {
        self.handler.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// `PageFault` requests so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    /// Hangs up, as the kernel does for a process that is killed.
    pub(crate) fn die(&self) {
        self.faults.as_ref().unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Shuts the VM down, or, if it prefaults, waits until it has all its pages. What the handler came to.
    pub(crate) fn end(mut self, now: bool) -> io::Result<u64> {
        self.stop.store(now, Ordering::Release);
        self.handler.take().unwrap().join().unwrap()?;
        Ok(self.requests())
    }
}

/// What a receiving peer refused, and why.
pub(crate) type Refused = String;

/// `receive-migration` at `path`: listens, then receives one VM.
pub(crate) fn receive_at(path: &Path, how: Receive) -> JoinHandle<Result<Awake, Refused>> {
    let listener = UnixListener::bind(path).unwrap();
    let path: PathBuf = path.to_owned();
    std::thread::spawn(move || receive(&listener, how).map_err(|e| format!("{}: {e}", path.display())))
}

fn receive(listener: &UnixListener, how: Receive) -> Result<Awake, Refused> {
    let text = |e: io::Error| e.to_string();
    let (mut main, _) = listener.accept().map_err(text)?;
    let (mut files, mut mapped) = (Vec::<(u32, File)>::new(), None::<Vec<Region>>);
    let mut awake = None::<Awake>;
    let mut order = Vec::new();
    loop {
        let mut head = [0; 16];
        main.read_exact(&mut head).map_err(text)?;
        let command = u16::from_le_bytes([head[0], head[1]]);
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        order.push(command);
        let mut payload = vec![0; if command == MEMORY_FD { 0 } else { length as usize }];
        main.read_exact(&mut payload).map_err(text)?;
        match command {
            START => assert_eq!((order.len(), length), (1, 0)),
            MEMORY_FD => {
                assert_eq!((length, mapped.is_none()), (4, true));
                files.push(receive_fd(&main));
            }
            CONFIG => {
                let config: serde_json::Value = serde_json::from_slice(&payload).unwrap();
                mapped = Some(map(&config["memory_manager_data"]["guest_ram_mappings"], &files));
            }
            STATE => {
                let regions = mapped.take().ok_or("no configuration before the state")?;
                let faults = match how.postcopy {
                    true => Some(fault_connection(listener).map_err(text)?),
                    // As upstream: whoever has connected is hung up on.
                    false => {
                        listener.set_nonblocking(true).map_err(text)?;
                        drop(listener.accept());
                        None
                    }
                };
                awake = Some(wake(regions, payload, faults, how).map_err(text)?);
            }
            COMPLETE | COMPLETE_PAUSED => {
                let mut awake = awake.ok_or("no state before the end")?;
                let mut expected = [vec![START], vec![MEMORY_FD; files.len()], vec![CONFIG, STATE]].concat();
                expected.push(command);
                assert_eq!(order, expected, "the order of requests");
                awake.ran = command == COMPLETE;
                main.write_all(&response(OK)).map_err(text)?;
                return Ok(awake);
            }
            other => {
                main.write_all(&response(OK)).map_err(text)?;
                return Err(format!("ended by command {other}"));
            }
        }
        main.write_all(&response(OK)).map_err(text)?;
    }
}

fn response(status: u16) -> [u8; 16] {
    request(status, 0)
}

fn fault_connection(listener: &UnixListener) -> io::Result<UnixStream> {
    let (mut stream, _) = listener.accept()?;
    let mut role = [0; 2];
    stream.read_exact(&mut role)?;
    assert_eq!(role, [2, 0], "the role of a connection for faults");
    Ok(stream)
}

fn receive_fd(stream: &UnixStream) -> (u32, File) {
    let mut number = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut number)], &mut ancillary, flags).unwrap();
    let fd: OwnedFd = ancillary
        .drain()
        .find_map(|part| match part {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .expect("a descriptor with the slot");
    (u32::from_le_bytes(number), fd.into())
}

fn map(mappings: &serde_json::Value, files: &[(u32, File)]) -> Vec<Region> {
    let mappings = mappings.as_array().unwrap();
    assert_eq!(mappings.len(), files.len(), "a file for each slot");
    let region = |m: &serde_json::Value| {
        let number = |key: &str| m[key].as_u64().unwrap();
        let slot = Slot {
            slot: number("slot") as u32,
            gpa: number("gpa"),
            bytes: number("size"),
            file_offset: number("file_offset"),
        };
        let (_, file) = files.iter().find(|(n, _)| *n == slot.slot).expect("a file for the slot");
        assert!(file.metadata().unwrap().len() >= slot.file_offset + slot.bytes, "the file is long enough");
        Region {
            slot,
            memory: Mapped::new(file, slot.file_offset, slot.bytes),
            file: file.try_clone().unwrap(),
        }
    };
    mappings.iter().map(region).collect()
}

fn wake(regions: Vec<Region>, state: Vec<u8>, faults: Option<UnixStream>, how: Receive) -> io::Result<Awake> {
    let regions = Arc::new(regions);
    let (requests, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let connection = faults.as_ref().map(|f| f.try_clone()).transpose()?;
    let handler = match faults {
        None => None,
        Some(faults) => {
            let guard = Guard::new()?;
            regions.iter().try_for_each(|r| guard.register(&r.memory))?;
            let (regions, requests, stop) = (regions.clone(), requests.clone(), stop.clone());
            Some(std::thread::spawn(move || {
                let done = handle(&guard, &faults, &regions, &requests, &stop, how.prefault);
                if done.is_err() {
                    // A VMM would end here, and its guest with it, rather than run on without its guard.
                    std::mem::forget(guard);
                }
                done
            }))
        }
    };
    let awake = Awake { regions, state, ran: false, requests, stop, faults: connection, handler };
    if how.postcopy {
        // Restoring devices touches memory: the first page of it.
        awake.load(awake.regions[0].slot.gpa);
    }
    Ok(awake)
}

/// Cloud Hypervisor's `uffd_handler_loop`: faults first, then one page after another.
fn handle(
    guard: &Guard,
    mut faults: &UnixStream,
    regions: &[Region],
    requests: &AtomicU64,
    stop: &AtomicBool,
    prefault: bool,
) -> io::Result<()> {
    let mut resolve = |region: &Region, page: u64| -> io::Result<()> {
        requests.fetch_add(1, Ordering::AcqRel);
        faults.write_all(&request(PAGE_FAULT, 16))?;
        let mut range = [0; 16];
        range[..8].copy_from_slice(&(region.slot.gpa + page * PAGE).to_le_bytes());
        range[8..].copy_from_slice(&PAGE.to_le_bytes());
        faults.write_all(&range)?;
        if answer(faults)? != OK {
            return Err(io::Error::other("a page was refused"));
        }
        guard.go_on(region.memory.address() + page * PAGE, PAGE)
    };
    let all = regions.iter().flat_map(|r| (0..r.slot.bytes / PAGE).map(move |page| (r, page)));
    let mut next = prefault.then_some(all);
    let mut served = std::collections::HashSet::new();
    while !stop.load(Ordering::Acquire) {
        if let Some(address) = guard.fault(if next.is_some() { 0 } else { 5 }) {
            let inside =
                |r: &&Region| (r.memory.address()..r.memory.address() + r.slot.bytes).contains(&address);
            let region = regions.iter().find(inside).expect("a fault in memory that is registered");
            let page = (address - region.memory.address()) / PAGE;
            resolve(region, page)?;
            served.insert((region.slot.slot, page));
        } else if let Some(all) = &mut next {
            match all.find(|(r, page)| !served.contains(&(r.slot.slot, *page))) {
                Some((region, page)) => resolve(region, page)?,
                None => break,
            }
        }
    }
    faults.shutdown(std::net::Shutdown::Both)
}
