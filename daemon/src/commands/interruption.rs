//! Ctrl-C, SIGTERM and SIGHUP in the midst of a standby that no daemon does: the guest goes on, and the command says so.

use std::{
    io::{self, Write as _},
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use dormouse_chunkstore::Progress;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{failure::Failure, output};

/// Undoes what was done so far, and says how things stand then.
type GiveUp = Box<dyn FnOnce() -> String + Send>;

/// What a signal does at present.
enum Stage {
    /// The command ends at once, after this.
    Free(GiveUp),
    /// It goes on for now, and this is what it waits for.
    Bound(Wait),
}

/// What cannot be cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Firecracker's answer.
    Vmm,
    /// The store's, on whether the snapshot is durable.
    Store,
}

struct Inner {
    stage: Stage,
    /// A signal came while the command was bound.
    came: Option<&'static str>,
}

/// What signals do to a standby.
#[derive(Clone)]
pub(crate) struct Interruption(Option<Arc<Mutex<Inner>>>);

impl Interruption {
    /// Signals are somebody else's business.
    pub(crate) fn none() -> Self {
        Interruption(None)
    }

    /// Catches signals from here on, except those that this process was started to ignore (`nohup`). `json` is how the
    /// command tells of failures.
    ///
    /// # Errors
    /// They cannot be caught.
    pub(crate) fn catch(json: bool) -> Result<Self, Failure> {
        let untouched: GiveUp = Box::new(|| "nothing was done and the VM is as it was".into());
        let inner = Arc::new(Mutex::new(Inner { stage: Stage::Free(untouched), came: None }));
        let failed = |e: io::Error| Failure::new("bug", format!("signals: {e}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let caught = {
            let _inside = runtime.enter();
            let wanted = [
                ("SIGHUP", SignalKind::hangup()),
                ("SIGINT", SignalKind::interrupt()),
                ("SIGTERM", SignalKind::terminate()),
            ];
            let wanted = wanted.into_iter().filter(|(_, kind)| !is_ignored(kind.as_raw_value()));
            let caught = wanted.map(|(name, kind)| Ok((name, signal(kind)?)));
            caught.collect::<io::Result<Vec<_>>>().map_err(failed)?
        };
        let shared = inner.clone();
        thread::Builder::new()
            .name("dm-signals".into())
            .spawn(move || runtime.block_on(listen(caught, &shared, json)))
            .map_err(failed)?;
        Ok(Interruption(Some(inner)))
    }

    /// From here on a signal ends the command, after `give_up`.
    ///
    /// # Errors
    /// One came while the command was bound: it is to be given up now.
    pub(crate) fn free(&self, give_up: impl FnOnce() -> String + Send + 'static) -> Result<(), Failure> {
        let Some(mut inner) = self.lock() else { return Ok(()) };
        match inner.came.take() {
            Some(signal) => Err(interrupted(signal)),
            None => {
                inner.stage = Stage::Free(Box::new(give_up));
                Ok(())
            }
        }
    }

    /// From here on a signal waits. One that came before does not let this return: the command ends.
    pub(crate) fn bind(&self, wait: Wait) {
        if let Some(mut inner) = self.lock() {
            inner.stage = Stage::Bound(wait);
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Inner>> {
        Some(self.0.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Tells `inner` of progress, and that the command is bound once the snapshot gets its name.
pub(crate) struct BoundOnceNamed<'a> {
    pub(crate) inner: &'a dyn Progress,
    pub(crate) interruption: &'a Interruption,
}

impl Progress for BoundOnceNamed<'_> {
    fn begin(&self, total_bytes: u64) {
        self.inner.begin(total_bytes);
    }

    fn advance(&self, bytes: u64) {
        self.inner.advance(bytes);
    }

    fn naming(&self) {
        self.inner.naming();
        self.interruption.bind(Wait::Store);
    }
}

async fn listen(caught: Vec<(&'static str, Signal)>, shared: &Mutex<Inner>, json: bool) {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let waits = caught.into_iter().map(|(name, mut signal)| {
        let tell = tell.clone();
        async move { while signal.recv().await.is_some() && tell.send(name).is_ok() {} }
    });
    let mut waiting = tokio::task::JoinSet::new();
    for wait in waits {
        waiting.spawn(wait);
    }
    while let Some(name) = told.recv().await {
        came(name, shared, json);
    }
}

/// A signal came.
fn came(name: &'static str, shared: &Mutex<Inner>, json: bool) {
    let mut inner = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let again = inner.came.is_some();
    let wait = match &inner.stage {
        Stage::Bound(wait) => *wait,
        Stage::Free(_) => {
            let bound = Stage::Bound(Wait::Vmm);
            let Stage::Free(give_up) = std::mem::replace(&mut inner.stage, bound) else { return };
            // Nobody else does anything meanwhile: it is held until the end.
            let failure = interrupted(name);
            end(&Failure { message: format!("{}; {}", failure.message, give_up()), ..failure }, json);
        }
    };
    inner.came = Some(name);
    let text = match wait {
        Wait::Vmm => "waiting for Firecracker's answer: then the guest goes on",
        Wait::Store if again => {
            let what = "it is not known whether the snapshot is durable, so the VM stands still: give the same command \
                        again, which finishes it or lets the VM go on";
            let failure = interrupted(name);
            end(&Failure { message: format!("{}; {what}", failure.message), ..failure }, json);
        }
        Wait::Store => {
            "the snapshot is being named, and the store is waited for; a second signal leaves the VM as it stands"
        }
    };
    let _ = writeln!(io::stderr(), "{name}: {text}");
}

fn interrupted(signal: &str) -> Failure {
    Failure::new("interrupted", format!("interrupted by {signal}"))
}

fn end(failure: &Failure, json: bool) -> ! {
    output::failure(failure, json);
    process::exit(i32::from(failure.exit_code()));
}

/// Whether this process was started to ignore signal `number`.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (number - 1) & 1 == 1
}
