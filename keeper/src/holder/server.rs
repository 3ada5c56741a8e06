//! The holder's loop. It must never be what dies: it allocates little, takes bounded messages, and answers whatever
//! is wrong with a refusal.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::message::{self, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Request, Response};
use super::socket::HolderSocket;
use super::{Ended, HolderError, HolderOptions};
use crate::descriptors;
use crate::record::VmId;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Most VMs held.
const VMS_MAX: usize = 16 * 1024;
/// Messages taken from one connection before it is the others' turn.
const TURN: usize = 16;

struct Vm {
    record: Vec<u8>,
    uffd: OwnedFd,
    states: OwnedFd,
    process: OwnedFd,
    /// The connection of who serves it.
    served_by: Option<u64>,
}

struct Connection {
    fd: OwnedFd,
    greeted: bool,
}

#[derive(Default)]
struct Holder {
    vms: BTreeMap<VmId, Vm>,
    connections: BTreeMap<u64, Connection>,
    connections_made: u64,
}

/// Holds descriptors at `options.socket` until there is nothing left to hold.
///
/// # Errors
/// [`HolderError`]: it could not begin, or cannot wait for anything any more.
pub fn hold(options: &HolderOptions) -> Result<Ended, HolderError> {
    let Some(socket) = HolderSocket::bind(&options.socket)? else { return Ok(Ended::AnotherIsThere) };
    let limit = getrlimit(Resource::Nofile);
    // As many descriptors as it may have; with fewer it refuses sooner.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let mut holder = Holder::default();
    let mut idle_since = Instant::now();
    loop {
        if !holder.vms.is_empty() || !holder.connections.is_empty() {
            idle_since = Instant::now();
        } else if idle_since.elapsed() >= options.linger {
            return Ok(Ended::Idle);
        }
        let left = options.linger.saturating_sub(idle_since.elapsed());
        holder.turn(&socket, left).map_err(|error| HolderError::Io {
            what: "waiting",
            path: options.socket.clone(),
            error: error.into(),
        })?;
    }
}

impl Holder {
    /// Waits for something to do, for as long as `idle` if there is nothing to wait for, and does it.
    fn turn(&mut self, socket: &HolderSocket, idle: Duration) -> rustix::io::Result<()> {
        let (mut gone, mut speaking, mut ended) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut fds = vec![PollFd::new(&socket.fd, PollFlags::IN)];
            let heard = PollFlags::IN | PollFlags::RDHUP;
            fds.extend(self.connections.values().map(|c| PollFd::new(&c.fd, heard)));
            fds.extend(self.vms.values().map(|vm| PollFd::new(&vm.process, PollFlags::IN)));
            let timeout = Timespec {
                tv_sec: i64::try_from(idle.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(idle.subsec_nanos()),
            };
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            let mut answers = fds.iter().skip(1).map(PollFd::revents);
            for (&id, events) in self.connections.keys().zip(&mut answers) {
                if events.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
                    gone.push(id);
                } else if !events.is_empty() {
                    speaking.push(id);
                }
            }
            ended.extend(
                self.vms.keys().zip(answers).filter(|(_, e)| !e.is_empty()).map(|(id, _)| id.clone()),
            );
        }
        for id in ended {
            self.vms.remove(&id);
        }
        // Those that are gone come first: what they served is free for who asks now. Their last words still count.
        for id in gone {
            self.listen_to(id, usize::MAX);
            self.close(id);
        }
        for id in speaking {
            if !self.listen_to(id, TURN) {
                self.close(id);
            }
        }
        self.accept(socket);
        Ok(())
    }

    fn accept(&mut self, socket: &HolderSocket) {
        while let Ok((fd, user)) = socket.accept() {
            if user != rustix::process::geteuid().as_raw() || self.connections.len() >= CONNECTIONS_MAX {
                let why = "only processes of the same user are listened to, and not too many at a time";
                answer(fd.as_fd(), &Response::Refused { why: why.into() }, None);
                continue;
            }
            self.connections_made += 1;
            self.connections.insert(self.connections_made, Connection { fd, greeted: false });
        }
    }

    fn close(&mut self, connection: u64) {
        self.connections.remove(&connection);
        for vm in self.vms.values_mut().filter(|vm| vm.served_by == Some(connection)) {
            vm.served_by = None;
        }
    }

    /// Takes up to `messages` messages of a connection and answers them; false if it is to be closed.
    fn listen_to(&mut self, connection: u64, messages: usize) -> bool {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        for _ in 0..messages {
            let Some(peer) = self.connections.get(&connection) else { return false };
            let (bytes, descriptors) = match descriptors::receive(peer.fd.as_fd(), &mut buffer) {
                Ok((0, _)) => return false,
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
                    let why = "there is no room for the descriptors of this message: raise the holder's limit of open \
                               files (LimitNOFILE, ulimit -n)";
                    if !answer(peer.fd.as_fd(), &Response::Refused { why: why.into() }, None) {
                        return false;
                    }
                    continue;
                }
                Err(_) => return false,
            };
            let message = buffer.get(..bytes).unwrap_or_default();
            let refused = |why: String| (Response::Refused { why }, None);
            let (response, vm) = match message::decode::<Request>(message) {
                Ok((request, record)) => self.answer_to(connection, request, record, descriptors),
                Err(error) => refused(error.to_string()),
            };
            let vm = vm.and_then(|id| self.vms.get(&id));
            let Some(peer) = self.connections.get(&connection) else { return false };
            if !answer(peer.fd.as_fd(), &response, vm) {
                return false;
            }
        }
        true
    }

    /// Does what is asked: what to answer, and which VM with it.
    fn answer_to(
        &mut self,
        connection: u64,
        request: Request,
        record: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> (Response, Option<VmId>) {
        let refused = |why: &str| (Response::Refused { why: why.into() }, None);
        let Some(peer) = self.connections.get_mut(&connection) else { return refused("who are you?") };
        match request {
            Request::Hello { version: PROTOCOL_VERSION } => {
                peer.greeted = true;
                (Response::Done, None)
            }
            Request::Hello { version } => (
                Response::Refused {
                    why: format!(
                        "the holder speaks version {PROTOCOL_VERSION} of its protocol, not {version}: give another socket"
                    ),
                },
                None,
            ),
            _ if !peer.greeted => refused("say hello first"),
            Request::Keep { id } => {
                let Ok([uffd, states, process]) = <[OwnedFd; 3]>::try_from(descriptors) else {
                    return refused("a VM has three descriptors: userfaultfd, page states, pidfd");
                };
                let others = |vm: &Vm| vm.served_by.is_some_and(|by| by != connection);
                if self.vms.get(&id).is_some_and(others) {
                    return refused("a VM of this id is served by another process");
                }
                if self.vms.len() >= VMS_MAX && !self.vms.contains_key(&id) {
                    return refused("too many VMs");
                }
                let vm = Vm { record: record.to_vec(), uffd, states, process, served_by: Some(connection) };
                self.vms.insert(id, vm);
                (Response::Done, None)
            }
            Request::Release { id } => {
                if self.vms.get(&id).is_some_and(|vm| vm.served_by.is_some_and(|by| by != connection)) {
                    return refused("this VM is served by another process");
                }
                self.vms.remove(&id);
                (Response::Done, None)
            }
            Request::Take => match self.vms.iter_mut().find(|(_, vm)| vm.served_by.is_none()) {
                Some((id, vm)) => {
                    vm.served_by = Some(connection);
                    (Response::Vm { id: id.clone() }, Some(id.clone()))
                }
                None => {
                    let elsewhere = self.vms.values().filter(|vm| vm.served_by != Some(connection)).count();
                    (Response::NoMore { served_elsewhere: elsewhere }, None)
                }
            },
        }
    }
}

/// Sends an answer, with a VM if there is one; false if that cannot be done.
fn answer(to: BorrowedFd<'_>, response: &Response, vm: Option<&Vm>) -> bool {
    let record = vm.map_or(&[][..], |vm| &vm.record);
    let fds = vm.map(|vm| [vm.uffd.as_fd(), vm.states.as_fd(), vm.process.as_fd()]);
    let message = message::encode(response, record);
    message.is_ok_and(|m| descriptors::send(to, None, &m, fds.as_ref().map_or(&[], |f| &f[..])).is_ok())
}
