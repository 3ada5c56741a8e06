//! systemd's descriptor store: what a service hands to the manager is handed back when the service is started again.
//!
//! The unit needs `FileDescriptorStoreMax=` of at least four for each VM; what is beyond it systemd drops, and says so
//! in its journal only. Messages are those of sd_notify(3). They are sent from here rather than through a crate because
//! all descriptors of a VM must go in one message, and because the answer to `BARRIER=1` is waited for: only then is a
//! VM kept.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use super::record::RECORD_BYTES_MAX;
use super::{KeepError, Keeper, KeptVm, VmId, VmRecord, descriptors};
use crate::sys::listen_fds;

/// Before the id of a VM in the name of its descriptors.
const PREFIX: &str = "dormouse-";
/// How long the manager may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Names the file that holds a VM's record.
const RECORD_NAME: &str = "dormouse-vm-record";

/// Keeps VMs in the descriptor store of the service this process is.
#[derive(Debug)]
pub struct SystemdKeeper {
    socket: OwnedFd,
    manager: SocketAddrUnix,
    /// What was in the store when this process started, until it is taken.
    inherited: Mutex<Vec<(String, OwnedFd)>>,
}

impl SystemdKeeper {
    /// The store of this service, if it has one: `NOTIFY_SOCKET` is set. Descriptors of VMs that systemd gave this
    /// process are taken charge of here, others are left alone; only the first call in a process finds any.
    ///
    /// # Errors
    /// The manager's socket makes no sense.
    pub fn from_environment() -> io::Result<Option<Self>> {
        let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        // A store of no size is none; systemd says so from version 254 on.
        if std::env::var_os("FDSTORE").is_some_and(|size| size == "0") {
            return Ok(None);
        }
        Self::new(Path::new(&socket), listen_fds::take(|name| name.starts_with(PREFIX))).map(Some)
    }

    /// The store of the manager that listens at `manager` (`@` begins an abstract name), with what was `inherited` from
    /// it, by name.
    ///
    /// # Errors
    /// That is not the address of a socket.
    pub fn new(manager: &Path, inherited: Vec<(String, OwnedFd)>) -> io::Result<Self> {
        let manager = match manager.as_os_str().as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            _ => SocketAddrUnix::new(manager)?,
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(SystemdKeeper { socket, manager, inherited: Mutex::new(inherited) })
    }

    fn tell(&self, message: &str, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), KeepError> {
        descriptors::send(self.socket.as_fd(), Some(&self.manager), message.as_bytes(), fds)
            .map_err(KeepError::io("telling systemd"))
    }

    /// Waits until the manager has dealt with what it was told.
    fn barrier(&self) -> Result<(), KeepError> {
        let (ours, theirs) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(KeepError::io("making a pipe"))?;
        self.tell("BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let waiting = KeepError::io("waiting for systemd");
        let closed = rustix::event::poll(&mut [PollFd::new(&ours, PollFlags::IN)], Some(&limit));
        match closed.map_err(KeepError::io("waiting for systemd"))? {
            0 => Err(waiting(io::Error::from(io::ErrorKind::TimedOut))),
            _ => Ok(()),
        }
    }
}

impl Keeper for SystemdKeeper {
    fn keep(&self, vm: &KeptVm) -> Result<(), KeepError> {
        let record = vm.record.encode()?;
        let made = rustix::fs::memfd_create(RECORD_NAME, rustix::fs::MemfdFlags::CLOEXEC);
        let mut file = std::fs::File::from(made.map_err(KeepError::io("making a file in memory"))?);
        file.write_all(&record).map_err(KeepError::io("writing a record"))?;
        // Watched (FDPOLL), the pidfd would be dropped as soon as its process ends, and the others not.
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={PREFIX}{}\n", vm.record.id);
        self.tell(&message, &[vm.uffd.as_fd(), vm.states.as_fd(), vm.process.as_fd(), file.as_fd()])?;
        self.barrier()
    }

    fn release(&self, id: &VmId) -> Result<(), KeepError> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={PREFIX}{id}\n"), &[])
    }

    fn take_all(&self) -> Result<Vec<KeptVm>, KeepError> {
        let inherited = std::mem::take(&mut *self.inherited.lock().unwrap_or_else(PoisonError::into_inner));
        let mut by_vm: BTreeMap<String, Vec<OwnedFd>> = BTreeMap::new();
        for (name, fd) in inherited {
            by_vm.entry(name).or_default().push(fd);
        }
        let mut taken = Vec::new();
        for (name, descriptors) in by_vm {
            match sorted(descriptors) {
                Ok(vm) => taken.push(vm),
                Err(error) => tracing::error!(name, %error, "a kept VM cannot be taken up; it stays kept"),
            }
        }
        Ok(taken)
    }
}

/// Tells the descriptors of a VM apart, which come back in any order.
fn sorted(descriptors: Vec<OwnedFd>) -> Result<KeptVm, KeepError> {
    let (mut uffd, mut states, mut process, mut record) = (None, None, None, None);
    for fd in descriptors {
        let kind = descriptors::kind_of(&fd).map_err(KeepError::io("looking at a descriptor"))?;
        let kind = kind.to_string_lossy();
        let place = match &*kind {
            "anon_inode:[userfaultfd]" => &mut uffd,
            "anon_inode:[pidfd]" => &mut process,
            kind if kind.starts_with("pidfd:") => &mut process,
            kind if kind.starts_with("/memfd:") && kind.contains(RECORD_NAME) => &mut record,
            kind if kind.starts_with("/memfd:") => &mut states,
            kind => return Err(KeepError::Answer(format!("a descriptor that is {kind}"))),
        };
        *place = Some(fd);
    }
    match (uffd, states, process, record) {
        (Some(uffd), Some(states), Some(process), Some(record)) => {
            Ok(KeptVm { record: read_record(&record)?, uffd, states, process })
        }
        _ => Err(KeepError::Answer(
            "not all of its descriptors: is FileDescriptorStoreMax= at least four for each VM?".into(),
        )),
    }
}

fn read_record(file: &OwnedFd) -> Result<VmRecord, KeepError> {
    let (mut bytes, mut at) = (vec![0; RECORD_BYTES_MAX + 1], 0);
    while let Some(room) = bytes.get_mut(at..).filter(|room| !room.is_empty()) {
        match rustix::io::pread(file, room, at as u64).map_err(KeepError::io("reading a record"))? {
            0 => break,
            got => at += got,
        }
    }
    Ok(VmRecord::decode(bytes.get(..at).unwrap_or_default())?)
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
