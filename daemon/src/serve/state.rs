//! What the daemon knows: its store, its VMs, its listeners.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use dormouse_chunkstore::Store;
use dormouse_keeper::Keeper;
use serde_json::Value;

use super::{
    OnStop,
    api::{Health, Origin, State, VmDocument},
    gate::{self, Gate},
    listener::Listener,
    metrics::{Metrics, Now},
    totals::Totals,
    vm::{Vm, now_unix_ms},
};
use crate::failure::Failure;

/// VMs that are over and still told of.
const ENDED_MAX: usize = 256;

/// The daemon, as all its handlers and threads share it.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) store: Store,
    pub(super) key_id: Option<String>,
    /// The Firecracker that is started where a request names none.
    pub(super) firecracker: Option<PathBuf>,
    pub(super) on_stop: OnStop,
    /// With whom VMs are kept beyond this process.
    pub(super) keeper: Option<Arc<dyn Keeper>>,
    /// Closed to other users; below it each VM's sockets.
    pub(super) directory: PathBuf,
    pub(super) metrics: Metrics,
    since_unix_ms: u64,
    stopping: AtomicBool,
    /// What is begun with VMs passes it.
    pub(super) gate: Arc<Gate>,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    vms: BTreeMap<String, Arc<Vm>>,
    listeners: BTreeMap<String, Arc<Listener>>,
    /// The last number given out, so that none is given twice.
    last_number: u64,
    /// What VMs did that are no longer told of.
    forgotten: Totals,
    /// API sockets at which a VM is being woken.
    reserved: BTreeSet<PathBuf>,
}

/// A Firecracker that nobody else wakes a VM in.
#[derive(Debug)]
pub(super) struct Reserved<'a> {
    daemon: &'a Daemon,
    api_socket: PathBuf,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.daemon.tables().reserved.remove(&self.api_socket);
    }
}

impl Daemon {
    pub(super) fn new(
        store: Store,
        key_id: Option<String>,
        firecracker: Option<PathBuf>,
        on_stop: OnStop,
        keeper: Option<Arc<dyn Keeper>>,
        directory: PathBuf,
        metrics: Metrics,
    ) -> Self {
        Daemon {
            store,
            key_id,
            firecracker,
            on_stop,
            keeper,
            directory,
            metrics,
            since_unix_ms: now_unix_ms(),
            stopping: AtomicBool::new(false),
            gate: Arc::default(),
            tables: Mutex::default(),
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> Health {
        let tables = self.tables();
        Health {
            status: if self.is_stopping() { "stopping" } else { "ok" }.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            store: self.store.url().into(),
            key_id: self.key_id.clone(),
            since_unix_ms: self.since_unix_ms,
            vms: tables.vms.values().filter(|vm| vm.state() == State::Running).count(),
            listeners: tables.listeners.len(),
            keeps_vms: self.keeper.is_some(),
            on_stop: self.on_stop.to_string(),
        }
    }

    /// From now on nothing new is taken on.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Refuses what a daemon about to end should not begin.
    pub(super) fn accepting(&self) -> Result<(), Failure> {
        if !self.is_stopping() {
            return Ok(());
        }
        Err(gate::stopping())
    }

    /// A short name that was not used before, by an earlier daemon either.
    pub(super) fn short_name(&self) -> String {
        let mut tables = self.tables();
        tables.last_number = (tables.last_number + 1).max(now_unix_ms());
        let mut number = tables.last_number;
        let mut digits = Vec::new();
        while number > 0 {
            digits.push(char::from_digit((number % 36) as u32, 36).unwrap_or('0'));
            number /= 36;
        }
        digits.iter().rev().collect()
    }

    /// The VM called `id`.
    pub(super) fn vm(&self, id: &str) -> Result<Arc<Vm>, Failure> {
        self.tables().vms.get(id).cloned().ok_or_else(|| no_such_vm(id))
    }

    /// All VMs, the youngest last.
    pub(super) fn vms(&self) -> Vec<Arc<Vm>> {
        self.tables().vms.values().cloned().collect()
    }

    pub(super) fn documents(&self) -> Vec<VmDocument> {
        let mut all: Vec<_> = self.vms().iter().map(|vm| vm.document()).collect();
        all.sort_by_key(|vm| vm.since_unix_ms);
        all
    }

    /// A new VM, or the one there is that was asked for by the same request.
    ///
    /// # Errors
    /// The id has another VM.
    pub(super) fn enter(
        &self,
        id: Option<&str>,
        name: &str,
        origin: Origin,
        request: Value,
    ) -> Result<(Arc<Vm>, bool), Failure> {
        let id = match id {
            Some(id) => id.to_owned(),
            None => format!("{name}-{}", self.short_name()),
        };
        let mut tables = self.tables();
        if let Some(vm) = tables.vms.get(&id).filter(|vm| vm.state() != State::Failed) {
            return match vm.lock().request == request {
                true => Ok((vm.clone(), false)),
                false => Err(Failure::new("exists", format!("there is a VM {id}, from another request"))),
            };
        }
        let vm = Vm::new(&id, name, origin, request, self.gate.clone());
        // What failed has counted nothing.
        tables.vms.insert(id, vm.clone());
        Ok((vm, true))
    }

    /// Has the Firecracker at `api_socket` for oneself, until the guard is dropped.
    pub(super) fn reserve(&self, api_socket: &Path) -> Result<Reserved<'_>, Failure> {
        if self.tables().reserved.insert(api_socket.to_owned()) {
            return Ok(Reserved { daemon: self, api_socket: api_socket.to_owned() });
        }
        let message = format!("another VM is being woken at {}", api_socket.display());
        Err(Failure { retryable: true, ..Failure::new("busy", message) })
    }

    /// Forgets those that have been over for longest, beyond the number told of.
    pub(super) fn forget_oldest(&self) {
        let mut tables = self.tables();
        let mut over: Vec<_> = tables.vms.values().filter(|vm| vm.is_over()).cloned().collect();
        over.sort_by_key(|vm| vm.lock().ended_unix_ms);
        let excess = over.len().saturating_sub(ENDED_MAX);
        for vm in &over[..excess] {
            if let Some(report) = &vm.lock().report {
                tables.forgotten.add(report);
            }
            tables.vms.remove(&vm.id);
        }
    }

    /// What there is at this moment, for a scrape.
    pub(super) fn now(&self) -> Now {
        let (vms, mut totals, listeners) = {
            let tables = self.tables();
            let vms: Vec<_> = tables.vms.values().cloned().collect();
            (vms, tables.forgotten.clone(), tables.listeners.len() as u64)
        };
        let mut now = Now { listeners, since_unix_ms: self.since_unix_ms, ..Now::default() };
        now.stopping = self.is_stopping();
        let count = |state| vms.iter().filter(|vm| vm.state() == state).count() as u64;
        for (name, state) in
            [("starting", State::Starting), ("running", State::Running), ("detached", State::Detached)]
        {
            now.vms.push((name, count(state)));
        }
        for report in vms.iter().filter_map(|vm| vm.document().report) {
            totals.add(&report);
        }
        now.totals = totals;
        now
    }

    pub(super) fn listeners(&self) -> Vec<Arc<Listener>> {
        self.tables().listeners.values().cloned().collect()
    }

    pub(super) fn listener(&self, id: &str) -> Result<Arc<Listener>, Failure> {
        let found = self.tables().listeners.get(id).cloned();
        found.ok_or_else(|| Failure::new("no_such_listener", format!("there is no listener {id}")))
    }

    pub(super) fn add_listener(&self, listener: &Arc<Listener>) {
        self.tables().listeners.insert(listener.id.clone(), listener.clone());
    }

    pub(super) fn remove_listener(&self, id: &str) {
        self.tables().listeners.remove(id);
    }
}

fn no_such_vm(id: &str) -> Failure {
    Failure::new("no_such_vm", format!("there is no VM {id}"))
}
