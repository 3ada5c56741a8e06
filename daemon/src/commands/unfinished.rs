//! A standby whose process was killed between the capture and the end: what is left of it is done.

use dormouse_chunkstore::{Store, StoreError, StreamReport};
use dormouse_core::Name;
use dormouse_firecracker::{
    VmmProcess,
    tracking::Tracking,
    under_way::{Left, StandbyNote, StandbyUnderWay},
};
use dormouse_wake::build_predicted_stream;

use super::standby::{Document, StandbyArgs, VMSTATE, end};
use crate::failure::Failure;

/// A standby that was left behind, held so that nobody else finishes it.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pub(crate) note: StandbyNote,
    pub(crate) left: Left,
    under_way: StandbyUnderWay,
}

impl Unfinished {
    /// What is left to do of the standby of `process` with this note.
    ///
    /// # Errors
    /// The store cannot be asked, so nobody can tell: the guest is left as it is.
    pub(crate) fn judge(
        under_way: StandbyUnderWay,
        note: StandbyNote,
        process: &VmmProcess,
        store: &Store,
    ) -> Result<Self, Failure> {
        let left = note.left(process, store, VMSTATE)?;
        Ok(Unfinished { note, left, under_way })
    }

    /// What is answered once its VM has ended; `None` if that is not what is left to do.
    pub(crate) fn answer(&self) -> Option<Document> {
        let (Left::End { snapshot }, Some(captured)) = (&self.left, &self.note.captured) else { return None };
        let answer = serde_json::from_value::<Document>(captured.answer.clone());
        let answer =
            answer.inspect_err(|why| tracing::error!(%why, "the note of a standby makes no sense")).ok()?;
        Some(answer.finished_later(snapshot))
    }

    /// Ends the VM; and its snapshot gets a resume stream, if one can be made.
    pub(crate) fn end(
        self,
        process: &VmmProcess,
        tracking: &Tracking,
        store: &Store,
    ) -> Result<Option<StreamReport>, Failure> {
        let session = tracking.session_of(process);
        end(process)?;
        self.under_way.done();
        // What was written in the session is known no more; what was touched is the larger part.
        let stream = Name::new(&self.note.name)
            .ok()
            .map(|name| build_predicted_stream(store, &name, session.as_ref().map(|r| &r.session), &[]));
        Ok(stream.and_then(Result::ok).flatten())
    }

    /// Nothing is left to do.
    pub(crate) fn done(self) {
        self.under_way.done();
    }
}

/// What became of a standby that was left behind.
pub(crate) enum Earlier {
    /// It was the same, and this is its answer.
    Finished(Box<Document>),
    /// The guest is captured as it is now, by a standby that takes its place and is to be noted in place of it.
    Replaced {
        under_way: StandbyUnderWay,
        /// It paused a guest that ran, and nothing of that was stored.
        left_paused: bool,
    },
}

/// Does what is left of an earlier standby of `process`, if that is what `args` ask for.
pub(crate) fn finish(
    args: &StandbyArgs,
    under_way: StandbyUnderWay,
    earlier: StandbyNote,
    process: &VmmProcess,
    tracking: &Tracking,
    store: &Store,
) -> Result<Earlier, Failure> {
    let unfinished = Unfinished::judge(under_way, earlier, process, store)?;
    if unfinished.note.name == args.name.as_str()
        && !args.keep_running
        && let Some(mut document) = unfinished.answer()
    {
        document.stream = unfinished.end(process, tracking, store)?;
        return Ok(Earlier::Finished(Box::new(document)));
    }
    // That it runs, or has run since, somebody has seen to.
    if unfinished.left == (Left::Unclear { stands: true }) {
        return Err(unclear(&unfinished.note.name));
    }
    let left_paused = unfinished.left == Left::Undone && unfinished.note.was_running;
    Ok(Earlier::Replaced { under_way: unfinished.under_way, left_paused })
}

/// Others moved the name before anybody could see what became of the standby.
pub(crate) fn unclear(name: &str) -> Failure {
    let message = format!(
        "a standby of this VM as {name} was cut off, and {name} was moved or removed since: whether the snapshot was durable in \
         between, and is awake elsewhere, nobody can tell; the VM stands still: end it, or let it go on (PATCH /vm) if you \
         know that there is no other"
    );
    Failure::new("vmm", message)
}

/// What is known of a snapshot that was in doubt.
pub(crate) enum Resolved {
    /// It is durable, and its VM has ended.
    Durable(Box<Document>),
    /// It is not, and its guest may go on.
    NotStored(StandbyUnderWay),
}

/// Finds out whether the snapshot of a standby is durable of which the store did not say so, and finishes it then.
///
/// # Errors
/// Nobody can tell: the guest stands still, and the standby is left behind for whoever comes next.
pub(crate) fn resolve(
    doubt: &StoreError,
    under_way: StandbyUnderWay,
    note: StandbyNote,
    process: &VmmProcess,
    tracking: &Tracking,
    store: &Store,
) -> Result<Resolved, Failure> {
    let unfinished = Unfinished::judge(under_way, note, process, store).map_err(|failure| {
        let message = format!(
            "it is not known whether the snapshot is stored ({doubt}), and the store cannot be asked ({failure}); the VM \
             stands still until it can: ask again"
        );
        Failure { retryable: true, ..Failure::new("unavailable", message) }
    })?;
    if unfinished.left == Left::Undone {
        return Ok(Resolved::NotStored(unfinished.under_way));
    }
    if matches!(unfinished.left, Left::Unclear { .. }) {
        return Err(unclear(&unfinished.note.name));
    }
    let Some(mut document) = unfinished.answer() else {
        unfinished.done();
        let message = format!(
            "{doubt}; it has moved, but nobody can tell whether the guest stood still since: the snapshot and the VM are \
             two copies of one machine; end one of the two"
        );
        return Err(Failure::new("vmm", message));
    };
    document.stream = unfinished.end(process, tracking, store)?;
    Ok(Resolved::Durable(Box::new(document)))
}
