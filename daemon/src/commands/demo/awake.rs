//! A machine that has been woken: how that is done, and waiting for what it says.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use dormouse_chunkstore::{Snapshot, Store};
use dormouse_embed::{self as embed, Prefetch, Wake, Woken};
use dormouse_guest::{Command, Console, Guest, GuestParams, native::NativeGuest};
use dormouse_minivm::{Dirty, MiniVm, MiniVmError, Timeline, VmShell, timeline::monotonic_now};
use dormouse_restore::{FailClosed, Policy, RestoreError};
use vm_memory::GuestMemoryMmap;

use super::{
    Kind,
    guest::{GuestArgs, PATIENCE, VCPU, failed, params, regions},
};
use crate::{context::Context, failure::Failure};

const LOOK: Duration = Duration::from_millis(20);

/// Times since the request.
#[derive(Clone, Copy)]
pub(super) struct Marks {
    pub(super) process: Duration,
    pub(super) open: Duration,
    pub(super) handshake: Duration,
    pub(super) first_instruction: Duration,
}

/// A machine that has been woken and asked for an answer.
pub(super) struct Awake {
    // Before the memory it runs on.
    pub(super) guest: Box<dyn Guest>,
    pub(super) woken: Woken,
    pub(super) store: Store,
    pub(super) timeline: Timeline,
    pub(super) marks: Marks,
    /// Why a page had to be withheld from it.
    withheld: Arc<Mutex<Option<String>>>,
}

impl Awake {
    pub(super) fn wake(
        args: &GuestArgs,
        context: &Context,
        prefetch: Prefetch,
        track: bool,
    ) -> Result<Self, Failure> {
        let begun = Duration::from_nanos(args.begun);
        let now = || monotonic_now().saturating_sub(begun);
        let process = now();
        let timeline = Timeline::begun_at(begun);
        let shell = (args.guest == Kind::Kvm).then(|| {
            let timeline = timeline.clone();
            thread::spawn(move || VmShell::create_with(timeline))
        });
        let params = params(args)?;
        let store = context.open_store()?;
        let resume = store.open_resume(&args.name)?;
        let snapshot = resume.snapshot.clone();
        let open = now();
        let (withheld, policy) = policy();
        let how = Wake { prefetch, policy, kvm: args.guest == Kind::Kvm, ..Wake::default() };
        let woken = embed::wake_resume(resume, &regions(&params), how).map_err(failed)?;
        let handshake = now();
        let mut guest = assemble(shell, woken.memory(), &snapshot, &params, track)?;
        guest.send(Command::Answer);
        guest.resume().map_err(failed)?;
        let marks = Marks { process, open, handshake, first_instruction: now() };
        Ok(Awake { guest, woken, store, timeline, marks, withheld })
    }

    /// Waits for the answer and the first pass over all pages; the number of wrong pages.
    pub(super) fn watched(self) -> Result<(Self, u64), Failure> {
        match self.watch() {
            Ok(wrong) => Ok((self, wrong)),
            Err(failure) => {
                // It may wait for a page that never comes, so it cannot be stopped: it ends with this process.
                std::mem::forget(self);
                Err(failure)
            }
        }
    }

    fn watch(&self) -> Result<u64, Failure> {
        let console = self.guest.console();
        let passed = |console: &Console| console.count(b'.') + console.count(b'X') > 0;
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            let waited = console.wait_for(b'.', 1, LOOK);
            if let Some(why) = self.withheld.lock().unwrap_or_else(PoisonError::into_inner).clone() {
                return Err(failed(why));
            }
            if passed(console) {
                return Ok(console.wrong_total().max(console.count(b'x')));
            }
            if console.ended().is_some() {
                waited.map_err(failed)?;
            }
        }
        console.wait_for(b'.', 1, LOOK).map_err(failed)?;
        Ok(console.wrong_total())
    }
}

type Shell = thread::JoinHandle<Result<VmShell, MiniVmError>>;

fn assemble(
    shell: Option<Shell>,
    memory: &GuestMemoryMmap,
    snapshot: &Snapshot,
    params: &GuestParams,
    track: bool,
) -> Result<Box<dyn Guest>, Failure> {
    let (memory, state) = (memory.clone(), snapshot.read_blob(VCPU)?);
    Ok(match shell {
        Some(shell) => {
            let shell = shell.join().map_err(|_| failed("creating the VM panicked"))?.map_err(failed)?;
            let dirty = if track { Dirty::Tracked } else { Dirty::Untracked };
            Box::new(MiniVm::restore(shell, memory, &state, dirty).map_err(failed)?)
        }
        None => Box::new(NativeGuest::restore(memory, params, &state, track).map_err(failed)?),
    })
}

/// A page that cannot be had ends the machine: its process says why and exits.
fn policy() -> (Arc<Mutex<Option<String>>>, Policy) {
    let withheld = Arc::new(Mutex::new(None));
    let why = Arc::clone(&withheld);
    let kill = move |error: &RestoreError| {
        why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
    };
    (
        withheld,
        Policy { fail_closed: FailClosed::Kill(Arc::new(kill)), prefetch_workers: 1, ..Policy::default() },
    )
}
