//! Images in a store as the base of a disk.

use std::sync::Arc;

use dormouse_chunkstore::{DecodedFrame, FramePlace, Image, NearFrame, StoreError};
use dormouse_core::{
    Section, SectionIndex,
    page::{PAGE_BYTES, PageIndex, Slot},
    section,
};
use dormouse_disk::source::{
    Content, Effort, Frame, FrameToken, PageSource, Place, SourceError, SourceErrorKind,
};

/// An image of a snapshot that was opened in a store. The store's caches keep what was fetched.
#[derive(Clone, Debug)]
pub struct StoredDisk {
    image: Image,
}

impl StoredDisk {
    /// Serves the pages of `image`.
    pub fn new(image: Image) -> Self {
        StoredDisk { image }
    }

    /// A section of the page map, `None` if it takes more effort: it is a small read, but of the store.
    fn section(
        &self,
        index: SectionIndex,
        effort: Effort,
    ) -> Result<Option<Option<Arc<Section>>>, SourceError> {
        match effort {
            Effort::Cached | Effort::Near => Ok(self.image.loaded_section(index)),
            Effort::Fetch => self.image.section(index).map(Some).map_err(error),
        }
    }
}

/// What a disk should do about a store's error.
fn error(error: StoreError) -> SourceError {
    let kind = match &error {
        error if error.is_retryable() => SourceErrorKind::Retryable,
        StoreError::Damaged { .. } | StoreError::Format(_) => SourceErrorKind::Damaged,
        _ => SourceErrorKind::Gone,
    };
    SourceError::new(kind, error)
}

fn damaged(why: &'static str) -> SourceError {
    SourceError::new(SourceErrorKind::Damaged, why)
}

struct Whole(DecodedFrame);

impl Frame for Whole {
    fn copy(&self, slot: usize, into: &mut [u8]) -> Option<()> {
        into.copy_from_slice(self.0.pages(Slot::new(slot)?, into.len() / PAGE_BYTES)?);
        Some(())
    }
}

struct Near(NearFrame);

impl Frame for Near {
    fn copy(&self, slot: usize, into: &mut [u8]) -> Option<()> {
        into.copy_from_slice(&self.0.slots(slot, into.len() / PAGE_BYTES)?);
        Some(())
    }
}

impl PageSource for StoredDisk {
    fn locate(&self, page: u64, effort: Effort) -> Result<Option<Place>, SourceError> {
        if page >= self.image.pages().0 {
            return Err(SourceError::new(SourceErrorKind::Gone, "a page outside the image was asked for"));
        }
        let page = PageIndex(page);
        let Some(section) = self.section(page.section(), effort)? else { return Ok(None) };
        let left = page.section().pages(self.image.pages()).end - page.0;
        let Some(section) = section else {
            return Ok(Some(Place { pages: left, content: Content::Zero }));
        };
        Ok(Some(match section.extent(page.in_section()) {
            section::Extent::Zero { pages } => Place { pages: pages.min(left), content: Content::Zero },
            section::Extent::Frame { frame, slot, pages } => {
                // As in `StoredImage`: a frame is named by its section and its place in that section's table.
                let token = FrameToken(u64::from(page.section().0) << 32 | u64::from(frame));
                Place { pages: pages.min(left), content: Content::Frame { frame: token, slot: slot.get() } }
            }
        }))
    }

    fn frame(&self, token: FrameToken, effort: Effort) -> Result<Option<Arc<dyn Frame>>, SourceError> {
        let Some(section) = self.section(SectionIndex((token.0 >> 32) as u32), effort)? else {
            return Ok(None);
        };
        let place = || {
            let section = section?;
            let frame = *section.frames().get(token.0 as u32 as usize)?;
            Some(FramePlace { pack: *section.packs().get(frame.pack as usize)?, frame })
        };
        let place = place().ok_or_else(|| damaged("a frame was asked for that no page map has"))?;
        Ok(match effort {
            Effort::Cached => self.image.loaded_frame(&place).map(|frame| Arc::new(Whole(frame)) as _),
            Effort::Near => self.image.frame_at_hand(&place).map(|frame| Arc::new(Near(frame)) as _),
            Effort::Fetch => Some(Arc::new(Whole(self.image.frame(&place).map_err(error)?))),
        })
    }
}
