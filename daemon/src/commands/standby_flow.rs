//! A standby of one VM, step by step: each of them owns what was done so far, so that it can be undone from there.

use std::{
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use dormouse_chunkstore::{
    BlobBytes, BlobSource, Dirty, ImageSource, ImportRequest, Progress, Store, StoreError,
};
use dormouse_core::{ImageId, ImageKind};
use dormouse_firecracker::{
    ApiClient, Jail, VmmProcess,
    api::SnapshotKind,
    capture::{self, Capture},
    capture_files::CaptureFiles,
    room::Groups,
    tracking::{Base, Tracking},
    under_way::{self, NotePlace, StandbyNote, StandbyUnderWay},
    vcpus::VcpuMarks,
};
use dormouse_wake::Record;
use serde_json::json;

use super::{
    import::MEMORY,
    interruption::{BoundOnceNamed, Interruption, Wait},
    newer_guest::{announce_newer, withdraw_newer},
    standby::{
        API_PATIENCE, Asked, Document, StandbyArgs, VMSTATE, cannot_note, end, micros, predicted_stream,
        process_at, tracking, vmm_failure,
    },
    standby_choice::{Choice, choose},
    unfinished::{self, Earlier, Resolved},
};
use crate::{failure::Failure, traces};

/// How long a process whose API hung up may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_millis(500);

/// A standby that is noted on this host.
pub(super) struct Flow<'a> {
    args: &'a StandbyArgs,
    api: ApiClient,
    process: Arc<VmmProcess>,
    tracking: Tracking,
    store: Store,
    interruption: &'a Interruption,
    under_way: StandbyUnderWay,
    note: StandbyNote,
    begun: Instant,
    traced: traces::Phases,
}

/// What is to be captured.
pub(super) struct Chosen {
    choice: Choice,
    files: CaptureFiles,
    /// Firecracker opens the files there: it stays until they are written.
    jail: Option<Jail>,
}

/// A guest that was captured.
pub(super) struct Captured {
    choice: Choice,
    capture: Capture,
    /// What it touched since it woke.
    session: Option<Record>,
    document: Document,
}

/// How a step ended.
pub(super) enum Step<T> {
    Next(T),
    /// An earlier standby was the same, or the snapshot in doubt is durable: this is the answer.
    Finished(Box<Document>),
}

impl<'a> Flow<'a> {
    /// Checks all that can be refused before the guest is touched, and notes that a standby is under way.
    pub(super) fn begin(
        args: &'a StandbyArgs,
        asked: Asked,
        open_store: impl FnOnce() -> Result<Store, Failure>,
        interruption: &'a Interruption,
    ) -> Result<Step<(Self, Chosen)>, Failure> {
        let (begun, traced) = (Instant::now(), traces::Phases::begin());
        let api = ApiClient::new(&args.api_socket, API_PATIENCE);
        let process = Arc::new(process_at(&args.api_socket)?);
        let tracking = tracking()?;
        let jail = Jail::of(&process).map_err(|e| vmm_failure(&e))?;
        let store = open_store()?;
        let mut note = StandbyNote::new(&args.name, &args.api_socket, false);
        (note.by, note.request) = (asked.by, asked.request);
        let (mut under_way, earlier) =
            tracking.begin_standby(&process, &note).map_err(|e| cannot_note(&e))?;
        let (after_another, mut left_paused) = (earlier.is_some(), false);
        if let Some(earlier) = earlier {
            (under_way, left_paused) =
                match unfinished::finish(args, under_way, earlier, &process, &tracking, &store)? {
                    Earlier::Finished(document) => return Ok(Step::Finished(document)),
                    Earlier::Replaced { under_way, left_paused } => (under_way, left_paused),
                };
        }
        let untouched = Untouched { place: under_way.place(), after_another, left_paused };
        let (on_signal, signal_api) = (untouched.clone(), api.clone());
        interruption.free(move || on_signal.leave(&signal_api))?;
        let prepared = choose(args, &api, &process, jail.as_ref(), &tracking, &store).and_then(|chosen| {
            note.was_running = chosen.0.is_running || left_paused;
            (note.before, note.ends) = (Some(chosen.0.before.clone()), !args.keep_running);
            under_way.note(&note).map_err(|e| cannot_note(&e))?;
            if !args.keep_running {
                announce_newer(&store, &args.name, &chosen.0.before)?;
            }
            Ok(chosen)
        });
        let mut flow =
            Flow { args, api, process, tracking, store, interruption, under_way, note, begun, traced };
        match prepared {
            Ok((choice, files)) => {
                flow.traced.over("check");
                Ok(Step::Next((flow, Chosen { choice, files, jail })))
            }
            Err(failure) => {
                flow.withdraw();
                Err(flow.or_ended(untouched.leave_after(&flow.api, failure)))
            }
        }
    }

    /// Pauses the guest and has Firecracker write it down.
    pub(super) fn capture(mut self, chosen: Chosen) -> Result<(Self, Captured), Failure> {
        let Chosen { choice, files, jail } = chosen;
        let check_us = micros(self.begun.elapsed());
        // Before the capture, for which Firecracker touches pages of its own accord.
        let session = self.tracking.session_of(&self.process);
        self.interruption.bind(Wait::Vmm);
        // Taking a snapshot makes Firecracker count anew; from here on what was remembered is wrong.
        if let Err(error) = self.tracking.forget(&self.process) {
            return Err(self.let_go(Failure::new("tracking", error.to_string())));
        }
        let groups = Groups::of(self.process.peer().pid);
        let killed_before = groups.killed();
        let keep_running = self.args.keep_running;
        let captured = capture::capture(&self.api, choice.kind, self.note.was_running, keep_running, files);
        drop(jail);
        let capture = match captured {
            Ok(capture) => capture,
            Err(error) => {
                let failure = vmm_failure(&error);
                if error.hung_up() && self.process.wait_ended(DEATH_PATIENCE).unwrap_or(false) {
                    let out_of_memory = groups.killed() > killed_before;
                    self.withdraw();
                    self.under_way.place().clear();
                    return Err(ended(&self.process, out_of_memory, failure));
                }
                // One that stands still is for whoever comes next to let go on.
                if !error.stands_still() {
                    self.withdraw();
                    self.under_way.done();
                }
                return Err(failure);
            }
        };
        self.traced.over("capture");
        let resumable_us = micros(self.begun.elapsed());
        tracing::info!(resumable_us, "resumable on this host");
        let document = Document::of(self.args, &choice, &self.process, &capture, check_us, resumable_us);
        Ok((self, Captured { choice, capture, session, document }))
    }

    /// Stores what was captured. Once the name stands for it, the guest is only ever ended.
    pub(super) fn store(
        mut self,
        mut captured: Captured,
        progress: &dyn Progress,
    ) -> Result<Step<(Self, Captured)>, Failure> {
        let importing = Instant::now();
        let state = captured.capture.state.read().map_err(|e| Failure::new("memory", e.to_string()));
        let wanted = state.and_then(|state| {
            self.note_captured(&state, &captured.document)?;
            self.stored_on_signal(captured.capture.was_running)?;
            request(self.args, &captured.choice, &captured.capture, state)
        });
        let progress = BoundOnceNamed { inner: progress, interruption: self.interruption };
        let report = match wanted.map(|request| self.store.import(&request, &progress)) {
            Ok(Ok(report)) => report,
            Ok(Err(doubt @ StoreError::InDoubt { .. })) => return self.resolve(&captured, doubt),
            Ok(Err(error)) => return Err(self.give_back(&captured, error.into())),
            Err(failure) => return Err(self.give_back(&captured, failure)),
        };
        captured.document.import_is(report, micros(importing.elapsed()), micros(self.begun.elapsed()));
        self.traced.over("import");
        tracing::info!(durable_us = captured.document.durable_us, "durable in the store");
        Ok(Step::Next((self, captured)))
    }

    /// Ends the VM, unless it runs on; and its snapshot gets a resume stream.
    pub(super) fn finish(mut self, captured: Captured) -> Result<Document, Failure> {
        let Captured { capture, session, mut document, .. } = captured;
        let ending = Instant::now();
        if self.args.keep_running {
            let base = Base { name: self.args.name.to_string(), snapshot: document.snapshot.clone() };
            if let Err(error) = self.tracking.remember(&self.process, &base) {
                tracing::warn!(%error, "the next standby of this VM will capture all of its memory");
            }
        } else {
            // Killed from here on, it still answers all that is known. One that does not end stays noted.
            self.note_answer(&document);
            end(&self.process)?;
        }
        self.under_way.done();
        document.phases.end_us = micros(ending.elapsed());
        self.traced.over("end");
        let streaming = Instant::now();
        let dirtied = match capture.kind {
            SnapshotKind::Diff => capture.memory.written_pages().unwrap_or_default(),
            SnapshotKind::Full => Vec::new(),
        };
        let given_up = || "the snapshot is durable, without a resume stream: it wakes more slowly".to_owned();
        if let Err(interrupted) = self.interruption.free(given_up) {
            tracing::warn!(%interrupted, "the snapshot is durable, and gets no resume stream");
        } else {
            document.stream = predicted_stream(&self.store, &self.args.name, session.as_ref(), &dirtied);
        }
        document.phases.stream_us = micros(streaming.elapsed());
        self.traced.over("stream");
        document.tell();
        Ok(document)
    }

    /// Notes how the guest stands now: from here on the snapshot may become durable at any time.
    fn note_captured(&mut self, state: &[u8], document: &Document) -> Result<(), Failure> {
        if self.args.keep_running {
            return Ok(());
        }
        let vcpus = VcpuMarks::of(&self.process).inspect_err(|why| {
            tracing::warn!(%why, "should this be killed now, nobody can tell whether the guest stood still");
        });
        let (state, answer) = (under_way::hash_of(state), json!(document));
        self.note.captured = Some(under_way::Captured { state, vcpus: vcpus.ok(), answer });
        self.under_way.note(&self.note).map_err(|error| {
            Failure::new("tracking", format!("what was captured cannot be noted on this host: {error}"))
        })
    }

    fn note_answer(&mut self, document: &Document) {
        if let Some(captured) = &mut self.note.captured {
            captured.answer = json!(document);
        }
        if let Err(error) = self.under_way.note(&self.note) {
            tracing::warn!(%error, "should this be killed now, its answer will be less than all");
        }
    }

    /// What a signal does while the snapshot is stored and has no name yet.
    fn stored_on_signal(&self, was_running: bool) -> Result<(), Failure> {
        let (api, process, place) = (self.api.clone(), self.process.clone(), self.under_way.place());
        let as_it_was = self.args.keep_running || !was_running;
        let (store, name) = (self.store.clone(), self.args.name.clone());
        let before = self.note.before.clone().filter(|_| !self.args.keep_running);
        self.interruption.free(move || {
            if let Some(before) = &before {
                withdraw_newer(&store, &name, before);
            }
            let state = if as_it_was { stays(&place) } else { goes_on(&api, &process, &place) };
            format!("nothing was stored and {state}")
        })
    }

    /// Whether the snapshot is durable nobody knows. The guest goes on only once it is known that it may.
    fn resolve(self, captured: &Captured, doubt: StoreError) -> Result<Step<(Self, Captured)>, Failure> {
        if self.args.keep_running {
            let failure = Failure::from(doubt);
            let message = format!("{}; {}", failure.message, stays(&self.under_way.place()));
            return Err(Failure { message, ..failure });
        }
        let Flow { args, api, process, tracking, store, interruption, under_way, note, begun, traced } = self;
        match unfinished::resolve(&doubt, under_way, note.clone(), &process, &tracking, &store)? {
            Resolved::Durable(document) => Ok(Step::Finished(document)),
            Resolved::NotStored(under_way) => {
                let flow = Flow {
                    args,
                    api,
                    process,
                    tracking,
                    store,
                    interruption,
                    under_way,
                    note,
                    begun,
                    traced,
                };
                Err(flow.give_back(captured, doubt.into()))
            }
        }
    }

    /// The store did not take the snapshot: the VM goes on as if nothing had happened.
    fn give_back(self, captured: &Captured, failure: Failure) -> Failure {
        let failure = Failure { message: format!("{}; nothing was stored", failure.message), ..failure };
        if self.args.keep_running || !captured.capture.was_running {
            self.withdraw();
            let message = format!("{} and {}", failure.message, stays(&self.under_way.place()));
            return Failure { message, ..failure };
        }
        self.let_go(failure)
    }

    /// Takes back what was told of a newer guest.
    fn withdraw(&self) {
        if let (Some(before), false) = (&self.note.before, self.args.keep_running) {
            withdraw_newer(&self.store, &self.args.name, before);
        }
    }

    /// The guest goes on if it ran before.
    fn let_go(self, failure: Failure) -> Failure {
        self.withdraw();
        let place = self.under_way.place();
        let state = match self.note.was_running {
            true => goes_on(&self.api, &self.process, &place),
            false => stays(&place),
        };
        Failure { message: format!("{} and {state}", failure.message), ..failure }
    }

    /// The failure, or that Firecracker has ended, which explains it.
    fn or_ended(&self, failure: Failure) -> Failure {
        let listens = UnixStream::connect(&self.args.api_socket).is_ok();
        match !listens && self.process.wait_ended(DEATH_PATIENCE).unwrap_or(false) {
            true => ended(&self.process, false, failure),
            false => failure,
        }
    }
}

/// How to leave a VM that was not paused by this standby.
#[derive(Clone)]
struct Untouched {
    place: NotePlace,
    /// An earlier standby was left behind.
    after_another: bool,
    /// That had paused a guest that ran, and nothing of it was stored.
    left_paused: bool,
}

impl Untouched {
    fn leave(&self, api: &ApiClient) -> String {
        match (self.left_paused, self.after_another) {
            (true, _) => resumed(api, &self.place),
            // What was left behind before still is.
            (false, true) => "the VM is as it was".to_owned(),
            (false, false) => format!("nothing was done and {}", stays(&self.place)),
        }
    }

    fn leave_after(&self, api: &ApiClient, failure: Failure) -> Failure {
        let state = self.leave(api);
        match self.left_paused {
            true => Failure { message: format!("{} and {state}", failure.message), ..failure },
            false => failure,
        }
    }
}

/// A VM that is as it was.
fn stays(place: &NotePlace) -> String {
    place.clear();
    "the VM is as it was".to_owned()
}

/// A VM that ran and is paused, of which nothing was stored, goes on. If it cannot be told to, it is left behind for
/// whoever comes next.
fn goes_on(api: &ApiClient, process: &VmmProcess, place: &NotePlace) -> String {
    if process.has_ended().unwrap_or(false) {
        place.clear();
        return format!("Firecracker ({}) has ended meanwhile, and its guest with it", process.peer().pid);
    }
    resumed(api, place)
}

fn resumed(api: &ApiClient, place: &NotePlace) -> String {
    match api.resume() {
        Ok(()) => {
            place.clear();
            "the VM runs on".to_owned()
        }
        Err(error) => format!("the VM is still there, paused, and could not be resumed ({error}); ask again"),
    }
}

fn ended(process: &VmmProcess, out_of_memory: bool, why: Failure) -> Failure {
    let pid = process.peer().pid;
    let killed = match out_of_memory {
        true => ": its control group was full, and the kernel killed it",
        false => "",
    };
    let message = format!("Firecracker ({pid}) has ended, and its guest with it{killed}; {}", why.message);
    Failure { retryable: false, ..Failure::new("vmm", message) }
}

fn request(
    args: &StandbyArgs,
    choice: &Choice,
    captured: &Capture,
    state: Vec<u8>,
) -> Result<ImportRequest, Failure> {
    let id = |id: &str| ImageId::new(id).map_err(|e| Failure::usage(e.to_string()));
    let memory = ImageSource {
        id: id(MEMORY)?,
        kind: ImageKind::Memory,
        path: captured.memory.path(),
        dirty: (captured.kind == SnapshotKind::Diff).then_some(Dirty::FileData),
    };
    let disks = args.disk.iter().map(|disk| ImageSource {
        id: disk.id.clone(),
        kind: ImageKind::Disk,
        path: disk.file.clone(),
        dirty: None,
    });
    Ok(ImportRequest {
        parent: choice.parent.clone(),
        images: [memory].into_iter().chain(disks).collect(),
        blobs: vec![BlobSource { id: id(VMSTATE)?, bytes: BlobBytes::Memory(state) }],
        level: args.level,
        replace: args.replace,
        ..ImportRequest::new(args.name.clone())
    })
}
