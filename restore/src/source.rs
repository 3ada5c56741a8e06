//! The seam between a restore and whatever holds the image: where pages are, and their bytes.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex, Slot};

/// Names one frame within one [`PageSource`]; equal tokens mean the same decoded bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameToken(pub u64);

/// Where the pages of one image are. Implemented for stored images and by test doubles.
///
/// All methods are called concurrently from several threads. A panic in one is caught and counts as
/// [`SourceErrorKind::Damaged`].
pub trait PageSource: Send + Sync + 'static {
    /// Pages in the image.
    fn page_count(&self) -> PageCount;

    /// The run that holds `page`: zeros, or pages in consecutive slots of one frame. May block.
    ///
    /// The run must contain `page` and should reach back as well as forward from it as far as the
    /// frame allows, because the neighbours of a faulting page are installed with it.
    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError>;

    /// The frame, decoded and verified. Blocks for as long as the store takes.
    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError>;

    /// [`locate`](Self::locate) if it needs no waiting: called on the fault thread. `None` sends the fault
    /// to a worker.
    fn try_locate(&self, _page: PageIndex) -> Option<Extent> {
        None
    }

    /// [`fetch`](Self::fetch) if the frame is decoded already: called on the fault thread.
    fn try_fetch(&self, _frame: FrameToken) -> Option<DecodedFrame> {
        None
    }

    /// [`fetch`](Self::fetch) if it takes no waiting for a disk, a network or another thread, though it may take
    /// decoding, which should go no further than is asked for: called on the fault thread. `None` sends the fault to a
    /// worker.
    fn fetch_at_hand(&self, _frame: FrameToken) -> Option<DecodedFrame> {
        None
    }

    /// All runs of the image known to show pages of `frame`, if that is quickly told: once the frame is decoded,
    /// they are installed behind the back of the guest. Otherwise only the run of a fault is.
    fn runs_of(&self, _frame: FrameToken) -> Option<Vec<Extent>> {
        None
    }
}

/// A run of image pages that are all held in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The run's first page.
    pub first: PageIndex,
    /// Pages in the run, at least one.
    pub pages: u64,
    /// What they hold.
    pub content: Content,
}

/// What the pages of an [`Extent`] hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeros.
    Zero,
    /// Pages of a frame, in consecutive slots.
    Frame {
        /// The frame.
        frame: FrameToken,
        /// The slot of the run's first page.
        slot: Slot,
    },
}

impl Extent {
    /// A run of zero pages.
    pub const fn zero(first: PageIndex, pages: u64) -> Self {
        Extent { first, pages, content: Content::Zero }
    }

    /// A run of pages in consecutive slots of `frame`, the first of them in `slot`.
    pub const fn frame(first: PageIndex, pages: u64, frame: FrameToken, slot: Slot) -> Self {
        Extent { first, pages, content: Content::Frame { frame, slot } }
    }

    /// The page after the run's last.
    pub fn end(&self) -> u64 {
        self.first.0.saturating_add(self.pages)
    }

    /// Whether `page` is in the run.
    pub fn contains(&self, page: PageIndex) -> bool {
        (self.first.0..self.end()).contains(&page.0)
    }
}

/// The bytes of one frame, whole pages in slot order, verified. What has not been asked for need not be decoded yet.
pub trait FrameBytes: Send + Sync {
    /// Pages held.
    fn pages(&self) -> u64;

    /// The bytes of `pages` slots from `slot` on, or `None` if the frame has fewer, or cannot be decoded.
    fn slots(&self, slot: u64, pages: u64) -> Option<Cow<'_, [u8]>>;
}

/// Bytes that are there.
impl<T: AsRef<[u8]> + Send + Sync> FrameBytes for T {
    fn pages(&self) -> u64 {
        (self.as_ref().len() / PAGE_BYTES) as u64
    }

    fn slots(&self, slot: u64, pages: u64) -> Option<Cow<'_, [u8]>> {
        let from = usize::try_from(slot).ok()?.checked_mul(PAGE_BYTES)?;
        let len = usize::try_from(pages).ok()?.checked_mul(PAGE_BYTES)?;
        self.as_ref().get(from..from.checked_add(len)?).map(Cow::Borrowed)
    }
}

/// One frame's bytes, shared.
#[derive(Clone)]
pub struct DecodedFrame(Arc<dyn FrameBytes>);

impl DecodedFrame {
    /// Wraps verified bytes without copying them.
    pub fn new(bytes: Arc<dyn FrameBytes>) -> Self {
        DecodedFrame(bytes)
    }

    /// Pages held.
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// The bytes of `pages` slots from `slot` on, or `None` if the frame has fewer, or cannot be decoded.
    pub fn slots(&self, slot: u64, pages: u64) -> Option<Cow<'_, [u8]>> {
        self.0.slots(slot, pages)
    }
}

impl From<Vec<u8>> for DecodedFrame {
    fn from(bytes: Vec<u8>) -> Self {
        DecodedFrame(Arc::new(bytes))
    }
}

impl fmt::Debug for DecodedFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DecodedFrame({} pages)", self.pages())
    }
}

/// What the restore should do about a [`SourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// Try again: the store is slow, away or throttling.
    Retryable,
    /// The store refuses: credentials have expired, or were withdrawn. Tried again as [`Retry`](crate::Retry) says, and
    /// from the start when that is over: nobody is ended for it, since whoever gives new ones may come at any time.
    Denied,
    /// What came back is not what the snapshot references. One more fetch is made, in case a cache or the
    /// wire was at fault.
    Damaged,
    /// The object does not exist; no retry can help.
    Gone,
}

/// A page could not be located or fetched.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// What to do about it.
    pub kind: SourceErrorKind,
    /// What was wrong, where, and how to mend it.
    pub message: String,
}

impl SourceError {
    /// An error of `kind`.
    pub fn new(kind: SourceErrorKind, message: impl Into<String>) -> Self {
        SourceError { kind, message: message.into() }
    }
}
