//! `dormouse serve-uffd NAME`: the memory of Firecracker VMs, page by page, over its userfaultfd handshake.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, mpsc},
    time::Duration,
};

use clap::{Args, ValueEnum, builder::PossibleValue};
use dormouse_chunkstore::Snapshot;
use dormouse_core::Name;
use dormouse_firecracker::{HandshakeListener, Incoming, KeepWith, Session, SessionOptions, SessionReport};
use dormouse_keeper::Keeper;
use dormouse_wake::{Opened, kept_snapshot};
use serde::Serialize;

use super::keeping::{KeepArgs, TakenUp, let_go, take_up};
pub(crate) use crate::machine::serving::{
    PolicyName, listen_failure, noted, outlive, refused, retry_for, thread_failure,
};
use crate::{
    cli::values,
    context::{self, Context},
    failure::{Failure, Status},
    human,
    machine::serving::{A_WHILE, HANDSHAKE_PATIENCE, Serving},
    traces::{self, TraceArgs},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct ServeUffdArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// Listen here: the `backend_path` of Firecracker's /snapshot/load, with backend_type "Uffd"
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Serve one VM, and end with it
    #[arg(long)]
    once: bool,

    /// Once all of a VM's memory is there, let the VM go its own way, and report it as it is then
    #[arg(long)]
    detach_when_filled: bool,

    #[command(flatten)]
    keep: KeepArgs,

    #[command(flatten)]
    serving: ServingArgs,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

/// How VMs are served.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServingArgs {
    /// What to do when a page a VM waits for cannot be had correctly
    #[arg(long, value_name = "POLICY", value_enum, default_value = "kill")]
    pub(crate) policy: PolicyName,

    /// How long to try again before that
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = values::duration)]
    pub(crate) give_up_after: Duration,

    /// Fetch only pages the guest touches
    #[arg(long)]
    pub(crate) no_prefetch: bool,

    /// Record for this long which pages the guest touches first; 0s for not at all
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = values::duration)]
    pub(crate) record_window: Duration,
}

impl ServingArgs {
    /// As the service has it.
    pub(crate) fn serving(&self) -> Serving {
        Serving {
            policy: self.policy,
            give_up_after: self.give_up_after,
            prefetch: !self.no_prefetch,
            record_window: self.record_window,
            page_by_page: false,
        }
    }

    pub(crate) fn options(&self) -> SessionOptions {
        self.serving().options()
    }
}

impl ValueEnum for PolicyName {
    fn value_variants<'a>() -> &'a [Self] {
        &[PolicyName::Kill, PolicyName::Hold]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            PolicyName::Kill => PossibleValue::new("kill").help("Kill the VM"),
            PolicyName::Hold => {
                PossibleValue::new("hold").help("Leave the VM waiting for that page, for somebody to look at")
            }
        })
    }
}

/// One VM that has ended.
#[derive(Debug, Serialize)]
struct Document {
    name: String,
    snapshot: String,
    #[serde(flatten)]
    vm: SessionReport,
}

/// What a VM of this server is woken from, and with whom it is kept.
struct Service<'a> {
    args: &'a ServeUffdArgs,
    opened: Opened,
    keeper: Option<Arc<dyn Keeper>>,
}

pub(crate) fn run(args: &ServeUffdArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    let keeper = args.keep.keeper(&args.socket)?;
    // Those that stand still come first.
    let taken_up = keeper.as_ref().map(|keeper| take_up(keeper, &store, args.serving.options()));
    let mut taken_up = taken_up.transpose()?.unwrap_or_default();
    let finish = |snapshot: &Snapshot, vm: SessionReport| {
        let reference = snapshot.reference();
        let (name, snapshot) = (reference.name.to_string(), reference.snapshot.to_string());
        let document = Document { name, snapshot, vm };
        context.print(&document, |out| print_report(out, &document.vm))?;
        let failed = document.vm.killed_because.is_some() || !document.vm.failures.is_empty();
        Ok(if failed { Status::Failed } else { Status::Done })
    };
    if args.once && !taken_up.is_empty() {
        let TakenUp { session, snapshot } = taken_up.swap_remove(0);
        return finish(&snapshot, args.until_end(session, &snapshot)?);
    }
    let opened = args.serving.serving().open(&store, &args.name, !args.once)?;
    let snapshot = opened.snapshot().clone();
    // Only a hint for `show` and `ls`.
    let hot = noted().filter(|_| opened.is_hot());
    let _hot = hot.map(|tracking| tracking.mark_hot(&snapshot.reference().snapshot.to_string()));
    let service = Service { args, opened, keeper };
    let listener = HandshakeListener::bind(&args.socket).map_err(|e| listen_failure(&e))?;
    let incoming = Incoming::start(listener, HANDSHAKE_PATIENCE).map_err(|e| thread_failure(&e))?;
    tracing::info!(socket = %args.socket.display(), "waiting for Firecracker");
    if args.once {
        let session = service.next_session(&incoming);
        // Whoever else comes finds nobody here.
        drop(incoming);
        return finish(&snapshot, args.until_end(session, &snapshot)?);
    }
    let (ended, reports) = mpsc::channel::<Result<(Snapshot, SessionReport), Failure>>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for report in reports {
                if let Err(failure) = report.and_then(|(snapshot, vm)| finish(&snapshot, vm)) {
                    tracing::error!(%failure, "a VM's end could not be told");
                }
            }
        });
        let serve = |session: Session, snapshot: Snapshot| {
            let (ended, args) = (ended.clone(), args.clone());
            // The receiver lives as long as this scope.
            std::thread::spawn(move || {
                let report = args.until_end(session, &snapshot);
                let _ = ended.send(report.map(|report| (snapshot, report)));
            });
        };
        for TakenUp { session, snapshot } in taken_up {
            serve(session, snapshot);
        }
        loop {
            serve(service.next_session(&incoming), snapshot.clone());
        }
    })
}

impl ServeUffdArgs {
    /// Waits until the VM needs this process no more.
    fn until_end(&self, session: Session, snapshot: &Snapshot) -> Result<SessionReport, Failure> {
        let vm = traces::vm(self.name.as_str()).entered();
        traces::tell(&vm, "dormouse.snapshot", snapshot.reference().snapshot.to_string());
        let report = if self.detach_when_filled { let_go(session) } else { outlive(session) }?;
        traces::served(&vm, &report);
        Ok(report)
    }
}

impl Service<'_> {
    /// Waits for a peer that can be served. Others are told of and sent away.
    fn next_session(&self, incoming: &Incoming) -> Session {
        loop {
            let handshake = match incoming.next(A_WHILE) {
                Some(Ok(handshake)) => handshake,
                Some(Err(error)) => {
                    tracing::warn!(%error, "a peer was sent away");
                    continue;
                }
                None => continue,
            };
            let options = self.args.serving.options();
            let session = match &self.keeper {
                None => Session::wake(handshake, &self.opened, options, noted()),
                Some(keeper) => {
                    let keep = KeepWith {
                        keeper: keeper.clone(),
                        snapshot: kept_snapshot::note(self.opened.snapshot()),
                        api_socket: None,
                        notes: BTreeMap::new(),
                    };
                    Session::wake_kept(handshake, &self.opened, options, noted(), keep)
                }
            };
            match session {
                Ok(session) => return session,
                Err(refusal) => {
                    let failure = refused(&refusal, options.on_failure);
                    tracing::warn!(%failure, "a VM was refused");
                }
            }
        }
    }
}

/// A VM's end, for people.
pub(crate) fn print_report(out: &mut dyn Write, vm: &SessionReport) -> io::Result<()> {
    let c = &vm.counters;
    writeln!(out, "VM of process {} has ended; memory {}", vm.pid, human::bytes(vm.memory_bytes))?;
    for (what, count) in [
        ("faults", c.faults),
        ("pages copied", c.pages_copied),
        ("zero pages", c.zero_pages),
        ("prefetched", c.prefetched_pages),
        ("  by the stream", c.streamed_pages),
        ("frames fetched", c.fetches),
        ("retries", c.retries),
        ("given back", c.removes),
        ("poisoned", c.poisoned),
    ] {
        writeln!(out, "  {what:<15} {count:>10}")?;
    }
    if let Some(measured) = &vm.working_set {
        let percent = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.1} %", s * 100.0));
        let (coverage, overfetch) = (percent(measured.coverage), percent(measured.overfetch));
        let samples = measured.counted.samples();
        writeln!(out, "  stream covered {coverage}, in vain {overfetch} ({samples} samples)")?;
    }
    if let Some(why) = &vm.killed_because {
        writeln!(out, "  killed because: {why}")?;
    }
    vm.failures.iter().try_for_each(|why| writeln!(out, "  withheld: {why}"))
}
