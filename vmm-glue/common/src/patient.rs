//! A source whose missing objects may come back.

use std::sync::Arc;

use dormouse_core::page::{PageCount, PageIndex};
use dormouse_restore::{DecodedFrame, Extent, FrameToken, PageSource, SourceError, SourceErrorKind};

/// Takes what is missing for what is away: a volume not mounted, a bucket being restored. The VM runs already and
/// cannot go on without it, so waiting costs nothing that giving up at once would save. Never what is damaged.
pub struct Patient(pub Arc<dyn PageSource>);

fn patient(error: SourceError) -> SourceError {
    match error.kind {
        SourceErrorKind::Gone => SourceError { kind: SourceErrorKind::Retryable, ..error },
        _ => error,
    }
}

impl PageSource for Patient {
    fn page_count(&self) -> PageCount {
        self.0.page_count()
    }

    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        self.0.locate(page).map_err(patient)
    }

    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        self.0.fetch(frame).map_err(patient)
    }

    fn try_locate(&self, page: PageIndex) -> Option<Extent> {
        self.0.try_locate(page)
    }

    fn try_fetch(&self, frame: FrameToken) -> Option<DecodedFrame> {
        self.0.try_fetch(frame)
    }

    fn fetch_at_hand(&self, frame: FrameToken) -> Option<DecodedFrame> {
        self.0.fetch_at_hand(frame)
    }

    fn runs_of(&self, frame: FrameToken) -> Option<Vec<Extent>> {
        self.0.runs_of(frame)
    }
}
