//! Images in a store as a [`PageSource`].

use std::{borrow::Cow, sync::Arc};

use dormouse_chunkstore::{FramePlace, Image, NearFrame, StoreError};
use dormouse_core::{
    Section, SectionIndex,
    page::{PageCount, PageIndex},
    section,
};

use dormouse_restore::{
    DecodedFrame, Extent, FrameBytes, FrameToken, PageSource, SourceError, SourceErrorKind,
};

/// A store's error, as what a restore should do about it.
pub fn source_error(error: StoreError) -> SourceError {
    let kind = match &error {
        StoreError::Unavailable { .. } => SourceErrorKind::Retryable,
        StoreError::Denied { .. } | StoreError::Archived { .. } => SourceErrorKind::Denied,
        StoreError::Missing { .. } => SourceErrorKind::Gone,
        _ => SourceErrorKind::Damaged,
    };
    SourceError::new(kind, error.to_string())
}

/// An image of a snapshot that was opened in a store.
#[derive(Clone, Debug)]
pub struct StoredImage {
    image: Image,
}

impl StoredImage {
    /// Serves the pages of `image`.
    pub fn new(image: Image) -> Self {
        StoredImage { image }
    }

    fn extent(&self, page: PageIndex, section: Option<&Section>) -> Extent {
        let pages = page.section().pages(self.page_count());
        let Some(section) = section else {
            return Extent::zero(PageIndex(pages.start), pages.end - pages.start);
        };
        let (first, extent) = section.extent_around(page.in_section());
        let first = PageIndex(pages.start + first as u64);
        let left = pages.end.saturating_sub(first.0);
        match extent {
            section::Extent::Zero { pages } => Extent::zero(first, pages.min(left)),
            section::Extent::Frame { frame, slot, pages } => {
                Extent::frame(first, pages.min(left), token(page.section(), frame), slot)
            }
        }
    }

    fn place(&self, frame: FrameToken, section: Option<Arc<Section>>) -> Result<FramePlace, SourceError> {
        let place = || {
            let section = section?;
            let frame = *section.frames().get(frame.0 as u32 as usize)?;
            Some(FramePlace { pack: *section.packs().get(frame.pack as usize)?, frame })
        };
        let why = || SourceError::new(SourceErrorKind::Damaged, "a frame was asked for that no page map has");
        place().ok_or_else(why)
    }
}

/// A frame whose stored bytes are at hand.
struct Near(NearFrame);

impl FrameBytes for Near {
    fn pages(&self) -> u64 {
        self.0.pages() as u64
    }

    fn slots(&self, slot: u64, pages: u64) -> Option<Cow<'_, [u8]>> {
        self.0.slots(usize::try_from(slot).ok()?, usize::try_from(pages).ok()?)
    }
}

/// A frame is named by the section that refers to it and its place in that section's table, so that no table of
/// tokens has to be kept.
fn token(section: SectionIndex, frame: u32) -> FrameToken {
    FrameToken(u64::from(section.0) << 32 | u64::from(frame))
}

fn section_of(frame: FrameToken) -> SectionIndex {
    SectionIndex((frame.0 >> 32) as u32)
}

impl PageSource for StoredImage {
    fn page_count(&self) -> PageCount {
        self.image.pages()
    }

    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        check(page, self.page_count())?;
        Ok(self.extent(page, self.image.section(page.section()).map_err(source_error)?.as_deref()))
    }

    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        let place = self.place(frame, self.image.section(section_of(frame)).map_err(source_error)?)?;
        Ok(DecodedFrame::new(Arc::new(self.image.frame(&place).map_err(source_error)?)))
    }

    fn try_locate(&self, page: PageIndex) -> Option<Extent> {
        check(page, self.page_count()).ok()?;
        Some(self.extent(page, self.image.loaded_section(page.section())?.as_deref()))
    }

    fn try_fetch(&self, frame: FrameToken) -> Option<DecodedFrame> {
        let place = self.place(frame, self.image.loaded_section(section_of(frame))?).ok()?;
        Some(DecodedFrame::new(Arc::new(self.image.loaded_frame(&place)?)))
    }

    fn fetch_at_hand(&self, frame: FrameToken) -> Option<DecodedFrame> {
        let place = self.place(frame, self.image.loaded_section(section_of(frame))?).ok()?;
        Some(DecodedFrame::new(Arc::new(Near(self.image.frame_at_hand(&place)?))))
    }

    fn runs_of(&self, frame: FrameToken) -> Option<Vec<Extent>> {
        let section = self.image.loaded_section(section_of(frame))??;
        let pages = section_of(frame).pages(self.page_count());
        let extent = |(at, extent)| {
            let section::Extent::Frame { slot, pages: n, .. } = extent else { return None };
            let first = pages.start + at as u64;
            let left = pages.end.checked_sub(first).filter(|left| *left > 0)?;
            Some(Extent::frame(PageIndex(first), n.min(left), frame, slot))
        };
        Some(section.extents_of(frame.0 as u32).filter_map(extent).collect())
    }
}

fn check(page: PageIndex, pages: PageCount) -> Result<(), SourceError> {
    if page.0 < pages.0 {
        return Ok(());
    }
    let why = format!("page {} is outside an image of {} pages", page.0, pages.0);
    Err(SourceError::new(SourceErrorKind::Gone, why))
}
