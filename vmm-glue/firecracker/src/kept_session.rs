//! Sessions that outlive the process: kept before the first page is served, gone on with by the next process.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dormouse_restore::{KeptStates, Memory, PageSource, Plan};

use super::handshake::{Handshake, Peer};
use super::regions::Region;
use super::session::{From, Refusal, Session, SessionError, SessionOptions};
use super::tracking::Tracking;
use dormouse_keeper::{KeepError, Keeper, KeptOptions, KeptSnapshot, KeptVm, VmId, VmRecord};
use dormouse_vmm_common::VmmProcess;
use dormouse_wake::Opened;

/// How long a process that served a VM before may take to be gone.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(30);

/// With whom a VM is kept, and what its next server must know of it.
#[derive(Clone, Debug)]
pub struct KeepWith {
    /// With whom.
    pub keeper: Arc<dyn Keeper>,
    /// What it is woken from.
    pub snapshot: KeptSnapshot,
    /// The VMM's API socket, if that is known.
    pub api_socket: Option<PathBuf>,
    /// Whatever else the next server should find in [`VmRecord::notes`].
    pub notes: BTreeMap<String, String>,
}

impl Session {
    /// As [`Session::start`], for a VM that outlives this process: its descriptors and page states are with a keeper
    /// before it is given its first page. `keep.snapshot` must be what `source` is an image of.
    ///
    /// When [`Session::wait`] sees the VM end, or [`Session::detach`] lets it go, the keeper is told to release it.
    /// Until then any process may be killed, and the next one goes on by [`Session::readopt`].
    ///
    /// # Errors
    /// [`Refusal`]. The VM is not kept then, and has not got a single page.
    pub fn start_kept(
        handshake: Handshake,
        source: Arc<dyn PageSource>,
        options: SessionOptions,
        keep: KeepWith,
    ) -> Result<Self, Box<Refusal>> {
        Self::begin(handshake, From::Source(source), options, Keeping::With(keep))
    }

    /// As [`Session::wake`] and [`Session::start_kept`]. A process that takes the VM over does so without the stream,
    /// and goes on with the record that is noted in `tracking`.
    ///
    /// # Errors
    /// As [`Session::start_kept`].
    pub fn wake_kept(
        handshake: Handshake,
        opened: &Opened,
        options: SessionOptions,
        tracking: Option<Tracking>,
        keep: KeepWith,
    ) -> Result<Self, Box<Refusal>> {
        Self::begin(handshake, From::Opened(Box::new(opened.clone()), tracking), options, Keeping::With(keep))
    }

    /// Goes on with a VM that another process served, and has left to `keeper`. `opened` is `kept.record.snapshot`,
    /// opened by [`kept_snapshot::open`](dormouse_wake::kept_snapshot::open); `kept.record.options` says how the VM was served. What that process had noted in
    /// `tracking` of first touches is gone on with, as far as its window and its bound allow; where it had noted nothing,
    /// nothing is recorded.
    ///
    /// Waits, up to half a minute, for the other process's last threads to be gone.
    ///
    /// # Errors
    /// [`Refusal`]: the VM stays kept, and waits, unless its process has ended ([`SessionError::Process`]); then it is
    /// released.
    pub fn readopt(
        kept: KeptVm,
        opened: &Opened,
        options: SessionOptions,
        keeper: Arc<dyn Keeper>,
        tracking: Option<Tracking>,
    ) -> Result<Self, Box<Refusal>> {
        let peer = Peer { pid: kept.record.pid, uid: kept.record.uid };
        let id = kept.record.id.clone();
        let process = match VmmProcess::of_pidfd(kept.process, peer) {
            Ok(process) => Arc::new(process),
            Err(error) => {
                if error.has_ended() {
                    release(&*keeper, &id);
                }
                return Err(Box::new(Refusal { error: error.into(), peer, process: None }));
            }
        };
        let keeping = Keeping::Taken { keeper, id, states: kept.states, snapshot: kept.record.snapshot };
        let memory = (kept.uffd, kept.record.regions);
        let from = From::Another(Box::new(opened.clone()), tracking);
        Self::start_for(memory, process.clone(), from, options, keeping)
            .map_err(|error| Box::new(Refusal { error, peer, process: Some(process) }))
    }
}

/// Whether a session is to outlive this process.
pub(super) enum Keeping {
    /// It is not.
    No,
    /// It is, from now on.
    With(KeepWith),
    /// It has.
    Taken { keeper: Arc<dyn Keeper>, id: VmId, states: OwnedFd, snapshot: KeptSnapshot },
}

/// A VM that is kept.
#[derive(Debug)]
pub(super) struct Kept {
    keeper: Arc<dyn Keeper>,
    pub(super) id: VmId,
    /// Whether nobody has served it before.
    pub(super) is_new: bool,
}

impl Kept {
    pub(super) fn release(&self) {
        release(&*self.keeper, &self.id);
    }
}

impl Keeping {
    /// The page states that outlive this process, with a keeper by now.
    pub(super) fn states(
        self,
        plan: &Plan,
        memory: &Memory,
        regions: &[Region],
        process: &VmmProcess,
        options: SessionOptions,
    ) -> Result<Option<(KeptStates, Kept)>, SessionError> {
        let with = match self {
            Keeping::No => return Ok(None),
            Keeping::Taken { keeper, id, states, snapshot } => {
                let image = image_of(&snapshot)?;
                let states = KeptStates::open(states, plan, memory, image, PREDECESSOR_PATIENCE)?;
                return Ok(Some((states, Kept { keeper, id, is_new: false })));
            }
            Keeping::With(with) => with,
        };
        let states = KeptStates::create(plan, memory, image_of(&with.snapshot)?)?;
        let peer = process.peer();
        let duplicating = |error| KeepError::Io { what: "duplicating descriptors", error };
        let vm = KeptVm {
            record: VmRecord {
                id: VmId::for_process(peer.pid).map_err(duplicating)?,
                snapshot: with.snapshot,
                regions: regions.to_vec(),
                options: KeptOptions {
                    on_failure: options.on_failure,
                    retry: options.retry,
                    prefetch: options.prefetch,
                },
                pid: peer.pid,
                uid: peer.uid,
                api_socket: with.api_socket,
                notes: with.notes,
            },
            uffd: memory.uffd().try_clone_fd().map_err(duplicating)?,
            states: states.as_fd().try_clone_to_owned().map_err(duplicating)?,
            process: process.try_clone_pidfd().map_err(duplicating)?,
        };
        with.keeper.keep(&vm)?;
        Ok(Some((states, Kept { keeper: with.keeper, id: vm.record.id, is_new: true })))
    }
}

/// Tells a keeper that a VM needs it no more. If that fails, a VM that has ended is found out by whoever takes it.
fn release(keeper: &dyn Keeper, id: &VmId) {
    if let Err(error) = keeper.release(id) {
        tracing::warn!(%id, %error, "the keeper could not be told that a VM needs it no more");
    }
}

fn image_of(snapshot: &KeptSnapshot) -> Result<[u8; 32], SessionError> {
    let id = snapshot.id().ok_or_else(|| KeepError::Answer("the kept snapshot's id is none".into()))?;
    Ok(id.0)
}
