//! The serving process's side: keeps VMs with a holder, and sees to it that there is one.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::message::{self, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Request, Response};
use super::socket;
use crate::{KeepError, Keeper, KeptVm, VmId, VmRecord, descriptors};

/// How long a holder may take to start, and to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether it is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Between two tries to reach one that is starting.
const TRY_INTERVAL: Duration = Duration::from_millis(5);

/// Keeps VMs in a holder process.
///
/// A holder that dies is replaced, and given again what this process serves: either of the two may be killed, and only
/// both at the same time leave VMs without anybody.
#[derive(Debug)]
pub struct HolderKeeper {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    socket: PathBuf,
    /// Started as `PROGRAM hold --socket PATH` where nobody listens.
    program: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    connection: OwnedFd,
    /// What this process serves, to give it to the next holder.
    kept: BTreeMap<VmId, KeptVm>,
}

impl HolderKeeper {
    /// Connects to the holder at `socket`. If there is none, `program` is started, which must understand
    /// `hold --socket PATH` as `dormouse` does.
    ///
    /// # Errors
    /// [`KeepError::NoHolder`].
    pub fn connect(socket: &Path, program: Option<&Path>) -> Result<Self, KeepError> {
        let connection = reach(socket, program)?;
        let state = Mutex::new(State { connection, kept: BTreeMap::new() });
        let inner =
            Arc::new(Inner { socket: socket.to_owned(), program: program.map(Path::to_owned), state });
        let watched = Arc::downgrade(&inner);
        std::thread::Builder::new()
            .name("dm-holder".into())
            .spawn(move || watch(&watched))
            .map_err(KeepError::io("starting a thread"))?;
        Ok(HolderKeeper { inner })
    }

    /// Where the holder listens.
    pub fn socket(&self) -> &Path {
        &self.inner.socket
    }
}

impl Keeper for HolderKeeper {
    fn keep(&self, vm: &KeptVm) -> Result<(), KeepError> {
        let mut state = self.inner.lock();
        let again = vm.try_clone().map_err(KeepError::io("duplicating descriptors"))?;
        self.inner.asking(&mut state, |connection| keep(connection, vm))?;
        state.kept.insert(vm.record.id.clone(), again);
        Ok(())
    }

    fn release(&self, id: &VmId) -> Result<(), KeepError> {
        let mut state = self.inner.lock();
        state.kept.remove(id);
        self.inner.asking(&mut state, |c| done(ask(c, &Request::Release { id: id.clone() }, &[], &[])?))
    }

    fn take_all(&self) -> Result<Vec<KeptVm>, KeepError> {
        let mut state = self.inner.lock();
        let mut taken = Vec::new();
        loop {
            let (response, record, descriptors) =
                self.inner.asking(&mut state, |c| ask(c, &Request::Take, &[], &[]))?;
            let id = match response {
                Response::Vm { id } => id,
                Response::NoMore { served_elsewhere } => {
                    tracing::debug!(served_elsewhere, "no more VMs to take up");
                    return Ok(taken);
                }
                other => return Err(unexpected(&other)),
            };
            match understood(&id, &record, descriptors) {
                Ok(vm) => {
                    let again = vm.try_clone().map_err(KeepError::io("duplicating descriptors"))?;
                    state.kept.insert(id, again);
                    taken.push(vm);
                }
                Err(error) => tracing::error!(%id, %error, "a kept VM cannot be taken up; it stays kept"),
            }
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the holder; if it is gone, the next one.
    fn asking<T>(
        &self,
        state: &mut State,
        what: impl Fn(BorrowedFd<'_>) -> Result<T, KeepError>,
    ) -> Result<T, KeepError> {
        match what(state.connection.as_fd()) {
            Err(KeepError::Io { error, .. }) => {
                tracing::warn!(%error, "the holder is gone; looking for another");
                self.renew(state)?;
                what(state.connection.as_fd())
            }
            answer => answer,
        }
    }

    /// Finds or starts another holder, and gives it what this process serves.
    fn renew(&self, state: &mut State) -> Result<(), KeepError> {
        state.connection = reach(&self.socket, self.program.as_deref())?;
        for (id, vm) in &state.kept {
            if let Err(error) = keep(state.connection.as_fd(), vm) {
                tracing::error!(%id, %error, "a VM is not kept any more: it depends on this process");
            }
        }
        Ok(())
    }
}

/// Looks after the holder for as long as its client is there.
fn watch(inner: &Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        let mut state = inner.lock();
        if hung_up(state.connection.as_fd())
            && let Err(error) = inner.renew(&mut state)
        {
            tracing::error!(%error, "no holder: VMs depend on this process");
        }
        drop(state);
        drop(inner);
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn hung_up(connection: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(connection, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Connects and says hello; starts `program` if nobody listens.
fn reach(path: &Path, program: Option<&Path>) -> Result<OwnedFd, KeepError> {
    let deadline = Instant::now() + PATIENCE;
    let no_holder = |why: String| KeepError::NoHolder { socket: path.to_owned(), why };
    let mut started: Option<std::process::Child> = None;
    loop {
        let refused = match greet(path) {
            Ok(connection) => {
                if let Some(mut child) = started {
                    // So that it is no zombie of ours once it has ended.
                    std::thread::spawn(move || child.wait());
                }
                return Ok(connection);
            }
            Err(refused @ KeepError::Refused(_)) => return Err(refused),
            Err(error) => error,
        };
        let over = Instant::now() >= deadline;
        let Some(program) = program.filter(|_| !over) else { return Err(no_holder(refused.to_string())) };
        // One that has ended well lost the race for the socket, or found the last holder just ending.
        let ended = started.as_mut().map(|child| child.try_wait().ok().flatten());
        if ended.flatten().is_some_and(|status| !status.success()) {
            let (program, path) = (program.display(), path.display());
            return Err(no_holder(format!("`{program} hold --socket {path}` fails; try it to see why")));
        }
        if ended.is_none_or(|ended| ended.is_some()) {
            started =
                Some(start(program, path).map_err(|e| no_holder(format!("{}: {e}", program.display())))?);
        }
        std::thread::sleep(TRY_INTERVAL);
    }
}

fn start(program: &Path, socket: &Path) -> std::io::Result<std::process::Child> {
    let mut command = Command::new(program);
    command.arg("hold").arg("--socket").arg(socket).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

fn greet(path: &Path) -> Result<OwnedFd, KeepError> {
    let no_holder =
        |e: super::HolderError| KeepError::NoHolder { socket: path.to_owned(), why: e.to_string() };
    let connection = socket::connect(path).map_err(no_holder)?;
    for which in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&connection, which, Some(PATIENCE)).map_err(KeepError::io("setting a timeout"))?;
    }
    done(ask(connection.as_fd(), &Request::Hello { version: PROTOCOL_VERSION }, &[], &[])?)?;
    Ok(connection)
}

fn keep(connection: BorrowedFd<'_>, vm: &KeptVm) -> Result<(), KeepError> {
    let descriptors = [vm.uffd.as_fd(), vm.states.as_fd(), vm.process.as_fd()];
    let request = Request::Keep { id: vm.record.id.clone() };
    done(ask(connection, &request, &vm.record.encode()?, &descriptors)?)
}

type Answer = (Response, Vec<u8>, Vec<OwnedFd>);

fn ask(
    connection: BorrowedFd<'_>,
    request: &Request,
    record: &[u8],
    with: &[BorrowedFd<'_>],
) -> Result<Answer, KeepError> {
    let not_understood = |e: message::MessageError| KeepError::Answer(e.to_string());
    let message = message::encode(request, record).map_err(not_understood)?;
    descriptors::send(connection, None, &message, with).map_err(KeepError::io("speaking to the holder"))?;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let (bytes, descriptors) =
        descriptors::receive(connection, &mut buffer).map_err(KeepError::io("listening to the holder"))?;
    if bytes == 0 {
        let gone = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        return Err(KeepError::io("listening to the holder")(gone));
    }
    let (response, record) =
        message::decode(buffer.get(..bytes).unwrap_or_default()).map_err(not_understood)?;
    Ok((response, record.to_vec(), descriptors))
}

fn done((response, ..): Answer) -> Result<(), KeepError> {
    match response {
        Response::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> KeepError {
    match response {
        Response::Refused { why } => KeepError::Refused(why.clone()),
        other => KeepError::Answer(format!("{other:?}")),
    }
}

fn understood(id: &VmId, record: &[u8], descriptors: Vec<OwnedFd>) -> Result<KeptVm, KeepError> {
    let [uffd, states, process] = <[OwnedFd; 3]>::try_from(descriptors)
        .map_err(|got| KeepError::Answer(format!("{} descriptors instead of three", got.len())))?;
    let record = VmRecord::decode(record)?;
    if record.id != *id {
        return Err(KeepError::Answer(format!("the record of {} for {id}", record.id)));
    }
    Ok(KeptVm { record, uffd, states, process })
}
