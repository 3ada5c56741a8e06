//! What is asked of the daemon and what it answers: the types behind docs/openapi.json, for both ends.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use dormouse_chunkstore::DEFAULT_LEVEL;
use dormouse_core::{ImageId, Name};
use dormouse_firecracker::SessionReport;
use serde::{Deserialize, Serialize};

use crate::{
    cli::values::{LONGEST_S, Part},
    client::MaybeDaemon,
    commands::standby::{self, StandbyArgs},
    failure::Failure,
    machine::{
        serving::{PolicyName, Serving},
        wake::{self, Wake},
    },
};

/// `POST /v1/vms`: wake a snapshot.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WakeRequest {
    /// What the VM will be called here. Whoever gives one can repeat the request without waking two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// The snapshot's name.
    pub(crate) snapshot: String,
    /// Start this Firecracker; default: the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) firecracker: Option<PathBuf>,
    /// Where its API is to listen; without `firecracker`: where one listens that has no guest yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api_socket: Option<PathBuf>,
    /// The file its standard output goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) console: Option<PathBuf>,
    /// The file, such as a FIFO, that its serial input comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) console_input: Option<PathBuf>,
    #[serde(default = "yes")]
    pub(crate) dirty_tracking: bool,
    /// Wake it even if a guest elsewhere is newer and was to replace it.
    #[serde(default)]
    pub(crate) older: bool,
    #[serde(default)]
    pub(crate) policy: PolicyName,
    #[serde(default = "two_minutes")]
    pub(crate) give_up_after_s: u64,
    #[serde(default = "yes")]
    pub(crate) prefetch: bool,
    #[serde(default = "five_seconds")]
    pub(crate) record_window_s: u64,
}

/// `POST /v1/listeners`: serve the memory of a snapshot to whoever comes to a socket.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListenRequest {
    pub(crate) snapshot: String,
    /// The `backend_path` of Firecracker's `/snapshot/load`.
    pub(crate) socket: PathBuf,
    /// The user who may connect; default: the daemon's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<u32>,
    #[serde(default)]
    pub(crate) policy: PolicyName,
    #[serde(default = "two_minutes")]
    pub(crate) give_up_after_s: u64,
    #[serde(default = "yes")]
    pub(crate) prefetch: bool,
    #[serde(default = "five_seconds")]
    pub(crate) record_window_s: u64,
}

/// `POST /v1/standby` and `POST /v1/vms/{id}/standby`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StandbyRequest {
    pub(crate) name: String,
    /// Told apart by this, the same request is done once, although the guest keeps running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_id: Option<String>,
    /// The API socket of a Firecracker, where the path does not name a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api_socket: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<String>,
    #[serde(default)]
    pub(crate) disks: Vec<DiskFile>,
    #[serde(default)]
    pub(crate) keep_running: bool,
    #[serde(default)]
    pub(crate) full: bool,
    #[serde(default)]
    pub(crate) replace: bool,
    #[serde(default = "default_level")]
    pub(crate) level: i32,
}

/// A drive and the file it is in.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiskFile {
    pub(crate) id: String,
    pub(crate) file: PathBuf,
}

/// `POST /v1/vms/{id}/stop`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StopRequest {
    /// Ask the guest with Ctrl+Alt+Del first, and give it so long before it is killed.
    #[serde(default)]
    pub(crate) grace_s: u64,
}

/// A request without anything to say.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// Where a VM is in its life here.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// It is being woken.
    Starting,
    /// It runs, and its memory is served.
    Running,
    /// It runs, and needs nothing of the daemon any more.
    Detached,
    /// Its process is gone.
    Ended,
    /// It never ran.
    Failed,
}

impl State {
    /// Whether the VM is gone or never was.
    pub(super) fn is_over(self) -> bool {
        matches!(self, State::Ended | State::Failed)
    }
}

/// Where a VM comes from.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(crate) enum Origin {
    /// Its Firecracker was started for it.
    Started,
    /// Its Firecracker was there, without a guest.
    Pool,
    /// It came to a listener for its memory.
    Listener { listener: String },
    /// It was there, and is being put on standby.
    Found,
    /// An earlier daemon served it.
    Kept,
}

/// A VM.
#[derive(Debug, Serialize)]
pub(crate) struct VmDocument {
    pub(crate) id: String,
    /// The snapshot's name, when the VM was woken.
    pub(crate) name: String,
    /// The snapshot's identity.
    pub(crate) snapshot: Option<String>,
    pub(crate) state: State,
    /// What is being done with it.
    pub(crate) operation: Option<&'static str>,
    pub(crate) origin: Origin,
    pub(crate) pid: Option<i32>,
    pub(crate) api_socket: Option<PathBuf>,
    pub(crate) since_unix_ms: u64,
    pub(crate) ended_unix_ms: Option<u64>,
    /// What `resume` prints.
    pub(crate) resume: Option<wake::Document>,
    /// What `standby` prints, of the last one.
    pub(crate) standby: Option<standby::Document>,
    /// What was served, once it is.
    pub(crate) report: Option<SessionReport>,
    /// Why it failed.
    pub(crate) failure: Option<String>,
}

/// `GET /v1/vms`.
#[derive(Debug, Serialize)]
pub(crate) struct VmList {
    pub(crate) vms: Vec<VmDocument>,
}

/// A listener.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ListenerDocument {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) snapshot: String,
    pub(crate) socket: PathBuf,
    pub(crate) uid: u32,
    pub(crate) since_unix_ms: u64,
    /// VMs that were taken on.
    pub(crate) served: u64,
    /// Peers that were sent away.
    pub(crate) refused: u64,
}

/// `GET /v1/listeners`.
#[derive(Debug, Serialize)]
pub(crate) struct ListenerList {
    pub(crate) listeners: Vec<ListenerDocument>,
}

/// `GET /v1/health`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Health {
    /// `ok` or `stopping`.
    pub(crate) status: String,
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) store: String,
    /// The identifier of the key in use.
    pub(crate) key_id: Option<String>,
    pub(crate) since_unix_ms: u64,
    /// VMs whose memory is served.
    pub(crate) vms: usize,
    pub(crate) listeners: usize,
    /// Whether VMs outlive the daemon, to be taken up again by the next.
    pub(crate) keeps_vms: bool,
    /// What becomes of VMs on SIGTERM.
    pub(crate) on_stop: String,
}

fn yes() -> bool {
    true
}

fn two_minutes() -> u64 {
    120
}

fn five_seconds() -> u64 {
    5
}

fn default_level() -> i32 {
    DEFAULT_LEVEL
}

fn name(text: &str) -> Result<Name, Failure> {
    Name::new(text).map_err(|e| Failure::usage(e.to_string()))
}

/// The daemon's working directory is not the caller's.
pub(crate) fn absolute(what: &str, path: &Path) -> Result<(), Failure> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Failure::usage(format!("{what} {} must be an absolute path", path.display())))
}

pub(super) fn seconds(what: &str, seconds: u64) -> Result<Duration, Failure> {
    if seconds > LONGEST_S {
        return Err(Failure::usage(format!("{what} is longer than any machine lives")));
    }
    Ok(Duration::from_secs(seconds))
}

impl WakeRequest {
    /// As the service has it.
    pub(crate) fn args(&self, default_firecracker: Option<&Path>) -> Result<Wake, Failure> {
        let pool = self.firecracker.is_none() && self.api_socket.is_some();
        let default = default_firecracker.filter(|_| !pool).map(Path::to_owned);
        let args = Wake {
            name: name(&self.snapshot)?,
            firecracker: self.firecracker.clone().or(default),
            api_socket: self.api_socket.clone(),
            console: self.console.clone(),
            dirty_tracking: self.dirty_tracking,
            older: self.older,
            serving: Serving {
                policy: self.policy,
                give_up_after: seconds("give_up_after_s", self.give_up_after_s)?,
                prefetch: self.prefetch,
                record_window: seconds("record_window_s", self.record_window_s)?,
                page_by_page: false,
            },
        };
        if args.firecracker.is_none() && !pool {
            return Err(Failure::usage(
                "give firecracker, a binary, or api_socket, where one listens; \
                                       the daemon has no default (--firecracker)",
            ));
        }
        if args.firecracker.is_none() && (self.console.is_some() || self.console_input.is_some()) {
            return Err(Failure::usage("a Firecracker that runs already has its console"));
        }
        for (what, path) in [
            ("firecracker", &self.firecracker),
            ("api_socket", &self.api_socket),
            ("console", &self.console),
            ("console_input", &self.console_input),
        ] {
            path.as_deref().map_or(Ok(()), |path| absolute(what, path))?;
        }
        Ok(args)
    }
}

impl ListenRequest {
    /// The snapshot and how to serve it.
    pub(crate) fn args(&self) -> Result<(Name, Serving), Failure> {
        absolute("socket", &self.socket)?;
        let serving = Serving {
            policy: self.policy,
            give_up_after: seconds("give_up_after_s", self.give_up_after_s)?,
            prefetch: self.prefetch,
            record_window: seconds("record_window_s", self.record_window_s)?,
            page_by_page: false,
        };
        Ok((name(&self.snapshot)?, serving))
    }
}

impl StandbyRequest {
    /// As the command line has it.
    pub(crate) fn args(&self, api_socket: &Path) -> Result<StandbyArgs, Failure> {
        absolute("api_socket", api_socket)?;
        if !(1..=19).contains(&self.level) {
            return Err(Failure::usage("level is 1 (fast) to 19 (dense)"));
        }
        if self.keep_running && !self.disks.is_empty() {
            return Err(Failure::usage(
                "disks are stored while the guest stands still: not with keep_running",
            ));
        }
        let disk = |disk: &DiskFile| {
            absolute("file", &disk.file)?;
            let id = ImageId::new(&disk.id).map_err(|e| Failure::usage(e.to_string()))?;
            Ok(Part { id, file: disk.file.clone() })
        };
        Ok(StandbyArgs {
            name: name(&self.name)?,
            api_socket: api_socket.to_owned(),
            parent: self.parent.as_deref().map(name).transpose()?,
            disk: self.disks.iter().map(disk).collect::<Result<_, Failure>>()?,
            keep_running: self.keep_running,
            full: self.full,
            replace: self.replace,
            level: self.level,
            daemon: MaybeDaemon::default(),
            traces: Default::default(),
        })
    }

    /// What the command line asked for.
    pub(crate) fn of(args: &StandbyArgs) -> Result<Self, Failure> {
        let disk = |part: &Part| {
            let file = absolute_from_here(Some(&part.file))?.unwrap_or_default();
            Ok(DiskFile { id: part.id.to_string(), file })
        };
        Ok(StandbyRequest {
            name: args.name.to_string(),
            request_id: None,
            api_socket: absolute_from_here(Some(&args.api_socket))?,
            parent: args.parent.as_ref().map(Name::to_string),
            disks: args.disk.iter().map(disk).collect::<Result<_, Failure>>()?,
            keep_running: args.keep_running,
            full: args.full,
            replace: args.replace,
            level: args.level,
        })
    }
}

pub(crate) fn absolute_from_here(path: Option<&Path>) -> Result<Option<PathBuf>, Failure> {
    path.map(|path| std::path::absolute(path).map_err(|e| Failure::file("finding", path, &e))).transpose()
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
