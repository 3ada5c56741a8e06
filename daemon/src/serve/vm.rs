//! One VM: what is known of it, and the one thing that may be under way with it.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dormouse_firecracker::{Session, SessionReport};
use serde_json::Value;
use tokio::sync::watch;
use tracing::Span;

use super::{
    api::{Origin, StandbyRequest, State, VmDocument},
    gate::{Gate, Pass},
    process::Process,
    scratch::Scratch,
};
use crate::{commands::standby, failure::Failure, machine::wake, traces};

/// A VM. Everybody who deals with it shares this.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: String,
    /// The snapshot's name.
    pub(super) name: String,
    span: Mutex<Span>,
    since_unix_ms: u64,
    state: watch::Sender<State>,
    /// What is begun with it passes this.
    gate: Arc<Gate>,
    inner: Mutex<Inner>,
}

/// What changes about a VM.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) origin: Origin,
    pub(super) snapshot: Option<String>,
    pub(super) process: Option<Arc<Process>>,
    pub(super) api_socket: Option<PathBuf>,
    /// There as long as its memory is served.
    pub(super) session: Option<Arc<Session>>,
    /// The child that was started for it and is to be waited for. It lives on when the daemon ends.
    pub(super) child: Option<u32>,
    /// Where its sockets are, to be removed after it.
    pub(super) scratch: Option<Scratch>,
    pub(super) resume: Option<wake::Document>,
    pub(super) standby: Option<(StandbyRequest, standby::Document)>,
    /// What was served, once its memory is served no more.
    pub(super) report: Option<SessionReport>,
    pub(super) ended_unix_ms: Option<u64>,
    pub(super) failure: Option<Failure>,
    /// The request it was made by.
    pub(super) request: Value,
    operation: Option<Operation>,
    /// A standby that was cut off is being finished.
    finishing: bool,
}

type Outcome = Option<Result<Value, Failure>>;

/// What is under way, and where its outcome will be told.
#[derive(Debug)]
struct Operation {
    kind: &'static str,
    request: Value,
    outcome: watch::Receiver<Outcome>,
}

impl Vm {
    pub(super) fn new(id: &str, name: &str, origin: Origin, request: Value, gate: Arc<Gate>) -> Arc<Self> {
        Arc::new(Vm {
            id: id.into(),
            name: name.into(),
            span: Mutex::new(span_of(id, name)),
            since_unix_ms: now_unix_ms(),
            state: watch::channel(State::Starting).0,
            gate,
            inner: Mutex::new(Inner {
                origin,
                snapshot: None,
                process: None,
                api_socket: None,
                session: None,
                child: None,
                scratch: None,
                resume: None,
                standby: None,
                report: None,
                ended_unix_ms: None,
                failure: None,
                request,
                operation: None,
                finishing: false,
            }),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is logged inside it carries the VM's id, and is of its trace.
    pub(super) fn span(&self) -> Span {
        self.span.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its trace ends here, as far as this daemon knows.
    pub(super) fn end_span(&self) {
        *self.span.lock().unwrap_or_else(PoisonError::into_inner) = Span::none();
    }

    pub(super) fn state(&self) -> State {
        *self.state.borrow()
    }

    pub(super) fn set_state(&self, state: State) {
        tracing::info!(parent: &self.span(), ?state, "state");
        self.state.send_replace(state);
    }

    /// Its memory is served no more. One that has ended meanwhile stays ended.
    pub(super) fn set_detached(&self) {
        let detached = self.state.send_if_modified(|state| {
            let goes_on = !state.is_over();
            if goes_on {
                *state = State::Detached;
            }
            goes_on
        });
        if detached {
            tracing::info!(parent: &self.span(), state = ?State::Detached, "state");
        }
    }

    /// Whether it is gone or never was.
    pub(super) fn is_over(&self) -> bool {
        self.state().is_over()
    }

    /// Whether something is under way with it.
    pub(super) fn is_busy(&self) -> bool {
        let inner = self.lock();
        inner.operation.is_some() || inner.finishing
    }

    /// Whether that is under way with it.
    pub(super) fn is_busy_with(&self, kind: &str) -> bool {
        let inner = self.lock();
        inner.operation.as_ref().is_some_and(|under_way| under_way.kind == kind)
            || (inner.finishing && kind == "standby")
    }

    /// Waits until it is over, for `patience` at most.
    pub(super) async fn wait_over(&self, patience: Duration) -> bool {
        let mut state = self.state.subscribe();
        let over = state.wait_for(|s| s.is_over());
        tokio::time::timeout(patience, over).await.is_ok()
    }

    /// The session, if its memory is served.
    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.lock().session.clone()
    }

    /// Takes the session out, once those who look at it for a moment are gone.
    pub(super) fn take_session(&self) -> Option<Session> {
        let report = self.session()?.report();
        let mut session = {
            let mut inner = self.lock();
            // Whoever adds up what was done finds one or the other.
            inner.report = Some(report);
            inner.session.take()?
        };
        loop {
            match Arc::try_unwrap(session) {
                Ok(session) => return Some(session),
                Err(shared) => session = shared,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn document(&self) -> VmDocument {
        let session = self.session();
        // Not under the lock: it looks at every counter.
        let report = session.map(|s| s.report());
        let inner = self.lock();
        VmDocument {
            id: self.id.clone(),
            name: self.name.clone(),
            snapshot: inner.snapshot.clone(),
            state: self.state(),
            operation: inner.operation.as_ref().map(|o| o.kind),
            origin: inner.origin.clone(),
            pid: inner.process.as_ref().map(|p| p.pid()),
            api_socket: inner.api_socket.clone(),
            since_unix_ms: self.since_unix_ms,
            ended_unix_ms: inner.ended_unix_ms,
            resume: inner.resume.clone(),
            standby: inner.standby.as_ref().map(|(_, document)| document.clone()),
            report: report.or_else(|| inner.report.clone()),
            failure: inner.failure.as_ref().map(|f| f.message.clone()),
        }
    }

    /// Does `work` on a thread of its own, and waits for what it gives. If the same `request` is under way, waits for
    /// that instead; if something else is, fails. Who stops waiting, as a client that hangs up, stops nothing.
    pub(super) async fn once(
        self: &Arc<Self>,
        kind: &'static str,
        request: Value,
        work: impl FnOnce(&Arc<Vm>) -> Result<Value, Failure> + Send + 'static,
    ) -> Result<Value, Failure> {
        let mut outcome = self.begin(kind, request, work)?;
        let told = outcome.wait_for(Option::is_some).await.ok().and_then(|o| o.clone());
        told.unwrap_or_else(|| Err(Failure::new("bug", format!("the {kind} of {} panicked", self.id))))
    }

    fn begin(
        self: &Arc<Self>,
        kind: &'static str,
        request: Value,
        work: impl FnOnce(&Arc<Vm>) -> Result<Value, Failure> + Send + 'static,
    ) -> Result<watch::Receiver<Outcome>, Failure> {
        let mut inner = self.lock();
        match &inner.operation {
            Some(under_way) if under_way.kind == kind && under_way.request == request => {
                return Ok(under_way.outcome.clone());
            }
            Some(under_way) => {
                let message = format!("the {} of {} is under way", under_way.kind, self.id);
                return Err(Failure { retryable: true, ..Failure::new("busy", message) });
            }
            None => {}
        }
        let pass = self.gate.enter()?;
        let (sender, outcome) = watch::channel(None);
        inner.operation = Some(Operation { kind, request, outcome: outcome.clone() });
        drop(inner);
        let over = Over { vm: self.clone(), _pass: pass };
        let span = tracing::info_span!(parent: &self.span(), "operation", kind);
        traces::name_it(&span, kind);
        traces::tell(&span, "dormouse.vm.id", self.id.clone());
        tokio::task::spawn_blocking(move || {
            let inside = span.entered();
            let result = work(&over.vm);
            traces::outcome(&inside, &result);
            if let Err(failure) = &result {
                tracing::warn!(code = failure.kind, %failure, "failed");
            }
            drop(inside);
            // Over before it is told: whoever hears of it may ask for the next.
            drop(over);
            sender.send_replace(Some(result));
        });
        Ok(outcome)
    }
}

fn span_of(id: &str, name: &str) -> Span {
    let span = tracing::info_span!("vm", id, snapshot = name);
    traces::tell(&span, "dormouse.vm.id", id.to_owned());
    traces::tell(&span, "dormouse.name", name.to_owned());
    span
}

/// Ends the operation of a VM when dropped, by a panic too.
struct Over {
    vm: Arc<Vm>,
    _pass: Pass,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.vm.lock().operation = None;
    }
}

/// A standby of a VM that was cut off is being finished, until this is dropped.
pub(super) struct Finishing {
    vm: Arc<Vm>,
    /// None if the daemon ends: what is cut off then is the next one's to finish.
    _pass: Option<Pass>,
}

impl Finishing {
    pub(super) fn begin(vm: &Arc<Vm>) -> Self {
        vm.lock().finishing = true;
        Finishing { vm: vm.clone(), _pass: vm.gate.enter().ok() }
    }
}

impl Drop for Finishing {
    fn drop(&mut self) {
        self.vm.lock().finishing = false;
    }
}

/// Milliseconds since 1970 UTC.
pub(super) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use serde_json::json;

    use super::*;

    fn vm() -> Arc<Vm> {
        Vm::new("one", "snapshot", Origin::Found, Value::Null, Arc::default())
    }

    #[tokio::test]
    async fn the_same_request_twice_is_done_once_and_another_is_told_to_wait() {
        let (vm, done) = (vm(), Arc::new(AtomicUsize::new(0)));
        let (go, gate) = mpsc::channel::<()>();
        let counted = done.clone();
        let first = vm.begin("standby", json!("a"), move |_| {
            gate.recv().ok();
            Ok(json!(counted.fetch_add(1, Ordering::SeqCst)))
        });
        let mut first = first.unwrap();
        let counted = done.clone();
        let again = move |_: &Arc<Vm>| Ok(json!(counted.fetch_add(1, Ordering::SeqCst)));
        let mut second = vm.begin("standby", json!("a"), again).unwrap();
        let other = vm.once("standby", json!("b"), |_| Ok(Value::Null)).await.unwrap_err();
        assert_eq!((other.kind, other.retryable), ("busy", true));
        go.send(()).unwrap();
        for outcome in [&mut first, &mut second] {
            let told = outcome.wait_for(Option::is_some).await.unwrap().clone();
            assert_eq!(told.unwrap().unwrap(), json!(0));
        }
        assert_eq!(done.load(Ordering::SeqCst), 1);
        assert_eq!(vm.once("stop", Value::Null, |_| Ok(json!(7))).await.unwrap(), json!(7));
    }

    #[tokio::test]
    async fn an_operation_that_panics_is_told_and_does_not_block_the_next() {
        let vm = vm();
        let panicked = vm.once("detach", Value::Null, |_| panic!("on purpose")).await.unwrap_err();
        assert_eq!(panicked.kind, "bug");
        assert_eq!(vm.once("detach", Value::Null, |_| Ok(json!(1))).await.unwrap(), json!(1));
    }

    #[tokio::test]
    async fn an_operation_goes_on_when_nobody_waits_for_it() {
        let (vm, (sender, receiver)) = (vm(), mpsc::channel());
        let (go, gate) = mpsc::channel::<()>();
        let waiting = vm.once("standby", Value::Null, move |_| {
            gate.recv().ok();
            sender.send("done").ok();
            Ok(Value::Null)
        });
        assert!(tokio::time::timeout(Duration::from_millis(20), waiting).await.is_err());
        go.send(()).unwrap();
        assert_eq!(receiver.recv(), Ok("done"));
    }
}
