//! `dormouse serve`: one process that serves many VMs, controlled over HTTP on a Unix socket.
//!
//! | module | holds |
//! |---|---|
//! | `api` | what is asked and answered: the types of docs/openapi.json |
//! | `routes`, `body`, `answer`, `codes` | from a request to an answer, or an error by name |
//! | `socket` | the control socket, and the address of counts: who may connect, and how long they may take |
//! | `state`, `vm` | what the daemon knows, and the one thing that may be under way with a VM |
//! | `wake`, `operations`, `listener` | what can be done |
//! | `kept`, `interrupted`, `scratch` | VMs of an earlier daemon, and what it left behind |
//! | `metrics`, `totals`, `counted` | what is counted |
//! | `stop`, `gate`, `notify` | the end, what may be begun until then, and what systemd is told |
//!
//! The runtime's threads carry requests and nothing else: whatever waits for a store, a disk or a VMM does so on a
//! blocking thread, and pages are served by the plain threads of each VM's restore.

pub(crate) mod answer;
pub(crate) mod api;
mod body;
pub(crate) mod codes;
mod counted;
mod gate;
mod interrupted;
mod kept;
mod listener;
mod metrics;
mod notify;
mod operations;
mod process;
mod routes;
mod scratch;
mod socket;
mod state;
mod stop;
mod totals;
mod vm;
mod wake;

use std::{fmt, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use clap::ValueEnum;
use dormouse_chunkstore::{Store, StoreOptions, backend::open_url};
use dormouse_keeper::Keeper;

use self::{
    counted::{Counted, StoreMetrics},
    metrics::Metrics,
    socket::{Control, Counts},
    state::Daemon,
};
use crate::failure::Failure;

/// How long answers may take that are under way at the end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3);

/// What becomes of VMs when the daemon is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnStop {
    /// They stand still where memory is missing until the next daemon takes them up; for restarts and upgrades
    Keep,
    /// All of their memory is installed; they go on without a daemon
    Detach,
    /// The daemon ends when the last of them has
    Wait,
}

impl fmt::Display for OnStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnStop::Keep => "keep",
            OnStop::Detach => "detach",
            OnStop::Wait => "wait",
        })
    }
}

/// How the daemon is set up.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) control: PathBuf,
    /// Where what is counted is read.
    pub(crate) metrics: Option<SocketAddr>,
    /// Where VMs' sockets are made; closed to other users.
    pub(crate) directory: PathBuf,
    pub(crate) store_url: String,
    pub(crate) store_options: StoreOptions,
    pub(crate) firecracker: Option<PathBuf>,
    pub(crate) on_stop: OnStop,
    /// With whom VMs are kept beyond this process.
    pub(crate) keeper: Option<Arc<dyn Keeper>>,
}

/// Serves until asked to end, and then does what the settings say with the VMs there are.
pub(crate) fn serve(settings: Settings, ready: impl FnOnce(Option<SocketAddr>)) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime
        .map_err(|e| Failure::new("threads", format!("no thread could be started: {e}; raise the limit")))?;
    let outcome = runtime.block_on(async {
        let store_metrics = StoreMetrics::default();
        let key_id = settings.store_options.key.as_ref().map(|key| key.id().to_string());
        let backend = Counted { inner: open_url(&settings.store_url)?, metrics: store_metrics.clone() };
        // A store that is away now may be back when it is needed; nobody waits for it here.
        let store = Store::with_backend_unasked(Arc::new(backend), settings.store_options);
        let metrics = Metrics::new(&store_metrics);
        let control = Control::bind(&settings.control)?;
        let counts = match settings.metrics {
            Some(address) => Some(Counts::bind(address).await?),
            None => None,
        };
        let daemon = Arc::new(Daemon::new(
            store,
            key_id,
            settings.firecracker,
            settings.on_stop,
            settings.keeper,
            settings.directory,
            metrics,
        ));
        let taking_up = daemon.clone();
        // They stand still until they are served again, so they come before any request.
        let taken_up = tokio::task::spawn_blocking(move || kept::take_up(&taking_up)).await;
        taken_up.map_err(|e| Failure::new("bug", e.to_string()))??;
        let stopped = stop::on_signal()?;
        let (end, ended) = tokio::sync::watch::channel(false);
        let counted_at = counts.as_ref().map(|(_, address)| *address);
        if let Some((counts, _)) = counts {
            tokio::spawn(socket::answer(counts, routes::counts(daemon.clone()), ended.clone()));
        }
        let answering = tokio::spawn(socket::answer(control, routes::router(daemon.clone()), ended));
        let watchdog = notify::watchdog();
        ready(counted_at);
        notify::ready();
        tracing::info!(control = %settings.control.display(), store = daemon.store.url(), "serving");
        // The sender lives as long as the signals' task.
        let _ = stopped.await;
        stop::stop(&daemon).await;
        end.send_replace(true);
        // What is being answered is answered, but for those who wait for something to happen.
        let _ = tokio::time::timeout(DRAIN_PATIENCE, answering).await;
        watchdog.abort();
        Ok(())
    });
    // Whoever waits for a store that hangs holds up nobody.
    runtime.shutdown_background();
    outcome
}
