//! What `standby firecracker` says of itself.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use dormouse_chunkstore::{ImportReport, StreamReport};
use dormouse_core::Name;
use dormouse_firecracker::{VmmProcess, api::SnapshotKind, capture::Capture};
use serde::{Deserialize, Serialize};

use super::{
    standby::{StandbyArgs, micros},
    standby_choice::Choice,
};
use crate::{human, traces};

/// What `standby` says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Document {
    name: String,
    pub(super) snapshot: String,
    parent: Option<String>,
    /// "full" or "diff".
    kind: Cow<'static, str>,
    /// Why all memory was captured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    full_because: Option<Cow<'static, str>>,
    pid: i32,
    ended: bool,
    /// The process that did it was killed before the VM had ended, and another one saw to that; or the store did not say
    /// that the snapshot is durable, and was asked. What had not been noted by then is 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    finished_later: bool,
    /// How long the guest stood still, or had to before it could have gone on.
    pub(crate) pause_us: u64,
    /// From the request until the snapshot was whole in this host's memory.
    resumable_us: u64,
    /// From the request until it was durable in the store.
    pub(crate) durable_us: u64,
    pub(super) phases: Phases,
    /// Bytes of memory captured.
    captured_bytes: u64,
    import: ImportReport,
    /// The resume stream, made from what the guest touched and wrote in this session; none if that is not known.
    #[serde(default)]
    pub(crate) stream: Option<StreamReport>,
}

impl Document {
    /// Of a guest that was captured, and is not stored yet.
    pub(super) fn of(
        args: &StandbyArgs,
        choice: &Choice,
        process: &VmmProcess,
        captured: &Capture,
        check_us: u64,
        resumable_us: u64,
    ) -> Self {
        let times = captured.times;
        Document {
            name: args.name.to_string(),
            snapshot: String::new(),
            parent: choice.parent.as_ref().map(Name::to_string),
            kind: if choice.kind == SnapshotKind::Full { "full" } else { "diff" }.into(),
            full_because: choice.full_because.map(Cow::from),
            pid: process.peer().pid,
            ended: !args.keep_running,
            finished_later: false,
            pause_us: micros(times.paused),
            resumable_us,
            durable_us: 0,
            phases: Phases {
                check_us,
                pause_us: micros(times.pause),
                snapshot_us: micros(times.snapshot),
                resume_us: micros(times.resume),
                ..Phases::default()
            },
            captured_bytes: captured.memory.stored_bytes().unwrap_or_default(),
            import: ImportReport { name: args.name.to_string(), ..ImportReport::default() },
            stream: None,
        }
    }

    pub(super) fn import_is(&mut self, report: ImportReport, import_us: u64, durable_us: u64) {
        self.snapshot.clone_from(&report.snapshot);
        (self.import, self.phases.import_us, self.durable_us) = (report, import_us, durable_us);
    }

    /// The answer of a standby that another process finished.
    pub(crate) fn finished_later(self, snapshot: &str) -> Self {
        let import = ImportReport { snapshot: snapshot.to_owned(), ..self.import };
        Document { snapshot: snapshot.to_owned(), import, finished_later: true, ..self }
    }

    /// What a trace says of it besides its phases.
    pub(super) fn tell(&self) {
        let span = tracing::Span::current();
        traces::tell(&span, "dormouse.name", self.name.clone());
        traces::tell(&span, "dormouse.snapshot", self.snapshot.clone());
        traces::tell(&span, "process.pid", i64::from(self.pid));
        traces::tell(&span, "dormouse.pause_us", i64::try_from(self.pause_us).unwrap_or(i64::MAX));
    }
}

/// Each of these follows the one before.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Phases {
    check_us: u64,
    pause_us: u64,
    snapshot_us: u64,
    resume_us: u64,
    import_us: u64,
    pub(super) end_us: u64,
    #[serde(default)]
    pub(super) stream_us: u64,
}

pub(crate) fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    let ms = |us: u64| us as f64 / 1e3;
    writeln!(out, "{} is on standby ({} capture of {})", d.name, d.kind, human::bytes(d.captured_bytes))?;
    writeln!(out, "  guest paused  {:>9.1} ms", ms(d.pause_us))?;
    writeln!(out, "  resumable     {:>9.1} ms", ms(d.resumable_us))?;
    writeln!(out, "  durable       {:>9.1} ms", ms(d.durable_us))?;
    writeln!(out, "  stored        {:>9}", human::bytes(d.import.stored_bytes))?;
    if let Some(stream) = &d.stream {
        let (pages, bytes) = (human::bytes(stream.raw_bytes), human::bytes(stream.stored_bytes));
        writeln!(out, "  stream        {pages:>9} in {bytes}")?;
    }
    let vm = if d.ended { "has ended" } else { "runs on" };
    writeln!(out, "  Firecracker ({}) {vm}", d.pid)
}
