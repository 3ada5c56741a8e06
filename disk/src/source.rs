//! The seam between a disk and whatever holds its base image.

use std::{fmt, sync::Arc};

/// Names one frame within one source; equal tokens mean the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameToken(pub u64);

/// How far a source may go for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    /// Only what is decoded in memory.
    Cached,
    /// What needs no network: decoding, or a file of this host.
    Near,
    /// Whatever it takes. May block for as long as the store does.
    Fetch,
}

/// A run of pages that are all held in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Pages from the one asked for on, at least one.
    pub pages: u64,
    /// What they hold.
    pub content: Content,
}

/// What the pages of a [`Place`] hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// Consecutive slots of a frame.
    Frame {
        /// The frame.
        frame: FrameToken,
        /// Slot of the first page.
        slot: usize,
    },
}

/// The verified pages of one frame.
pub trait Frame: Send + Sync {
    /// Copies the pages from `slot` on into `into`, whole pages. `None` if the frame has fewer or cannot be decoded.
    fn copy(&self, slot: usize, into: &mut [u8]) -> Option<()>;
}

/// Bytes that are there.
impl Frame for Vec<u8> {
    fn copy(&self, slot: usize, into: &mut [u8]) -> Option<()> {
        let from = slot.checked_mul(dormouse_core::PAGE_BYTES)?;
        into.copy_from_slice(self.get(from..from.checked_add(into.len())?)?);
        Some(())
    }
}

/// An immutable image, by pages. Methods are called from several threads at once; a panic in one counts as damage.
///
/// `Ok(None)` means that more effort is needed; with [`Effort::Fetch`] it counts as damage. What was fetched should be
/// found with less effort for a while, or read-ahead is in vain.
pub trait PageSource: Send + Sync + 'static {
    /// Where `page` is. The run should reach as far as the page's frame goes on.
    fn locate(&self, page: u64, effort: Effort) -> Result<Option<Place>, SourceError>;

    /// A frame, verified.
    fn frame(&self, frame: FrameToken, effort: Effort) -> Result<Option<Arc<dyn Frame>>, SourceError>;
}

/// A base of zeros: a new disk.
#[derive(Debug)]
pub struct ZeroSource;

impl PageSource for ZeroSource {
    fn locate(&self, _: u64, _: Effort) -> Result<Option<Place>, SourceError> {
        Ok(Some(Place { pages: u64::MAX, content: Content::Zero }))
    }

    fn frame(&self, _: FrameToken, _: Effort) -> Result<Option<Arc<dyn Frame>>, SourceError> {
        Ok(None)
    }
}

/// What to do about a [`SourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// Try again: the store is slow or away.
    Retryable,
    /// What came is not what was asked for. It is asked for once more, in case a cache or the wire was at fault.
    Damaged,
    /// No retry can help.
    Gone,
}

/// A page could not be located or fetched.
#[derive(Clone)]
pub struct SourceError {
    /// What to do about it.
    pub kind: SourceErrorKind,
    /// What the source said.
    pub cause: Arc<dyn std::error::Error + Send + Sync>,
}

impl SourceError {
    /// An error of `kind`.
    pub fn new(kind: SourceErrorKind, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        SourceError { kind, cause: cause.into().into() }
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl fmt::Debug for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.cause)
    }
}

impl std::error::Error for SourceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.source()
    }
}
