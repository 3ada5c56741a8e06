//! What a session of a VM teaches for the next one.

use dormouse_chunkstore::StreamReport;
use dormouse_restore::WORKING_SET_PAGES_MAX;
use dormouse_wake::{SessionRecord, predict};

use super::on_demand::RECORD_WINDOW;
use dormouse_wake::Opened;
use dormouse_wake::{Record, Records};

/// Remembers on this host what `session` showed of a VM that woke from `opened`. What was touched before its VMM came to
/// ask for it is not seen, so the record has gaps.
pub fn remember(opened: &Opened, session: SessionRecord) -> Record {
    let record = Record::new(opened.snapshot(), RECORD_WINDOW, false, session);
    if let Some(records) = Records::of(opened.snapshot().store()) {
        records.keep(&record);
    }
    record
}

/// Makes the resume stream of `opened` anew if `session` shows that a better one can be made; `None` if not.
///
/// What a session did not show is not forgotten: the new stream has all pages of the old one.
pub fn better_stream(opened: &Opened, session: &SessionRecord) -> Option<StreamReport> {
    let better = match opened.stream() {
        Some(_) => session.coverage.wants_another_set(),
        None => !session.missed.is_empty(),
    };
    let pages = predict(Some(session), &[], WORKING_SET_PAGES_MAX);
    let built = better.then(|| opened.build_stream(&pages))?;
    built.inspect_err(|why| tracing::info!(%why, "no better resume stream could be stored")).ok()
}
