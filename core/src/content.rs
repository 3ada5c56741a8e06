//! Digests of logical content: what a section or a blob holds, wherever it lies.

use crate::{
    domain::Domain,
    id::{ChunkId, Digest},
};

/// The digest of a section's content, chained over its history: the hash of the digest it was made from (32 zero
/// bytes for none) and of each page that changed, as u32 page in section, then 0 for a page that became zero, or
/// 1 and the page's chunk id.
///
/// Hashing all pages instead would need the id of every page that did not change, and those are only in the
/// footers of the packs that hold them: work in proportion to the image instead of to the change. As with a
/// commit's hash, equal digests mean equal content, and equal content reached in another way has another digest.
#[derive(Clone, Debug)]
pub struct SectionContent {
    hasher: blake3::Hasher,
    next_page: u32,
}

impl SectionContent {
    /// Begins the digest of a section made from the one of digest `previous`, or from all zero pages.
    ///
    /// A section in which nothing changed keeps its digest; it is not hashed again.
    pub fn new(domain: &Domain, previous: Option<&Digest>) -> Self {
        let mut hasher = domain.content_hasher();
        hasher.update(previous.unwrap_or(&[0; 32]));
        SectionContent { hasher, next_page: 0 }
    }

    /// Adds a page that changed; `None` if it is zero now. In page order, each page once.
    pub fn change(&mut self, page_in_section: u32, page: Option<&ChunkId>) {
        debug_assert!(page_in_section >= self.next_page, "pages are hashed in order");
        self.next_page = page_in_section + 1;
        self.hasher.update(&page_in_section.to_le_bytes());
        match page {
            None => self.hasher.update(&[0]),
            Some(id) => self.hasher.update(&[1]).update(&id.0),
        };
    }

    /// The digest.
    pub fn finish(&self) -> Digest {
        *self.hasher.finalize().as_bytes()
    }
}

/// The digest of a device-state blob's bytes.
pub fn blob_content(domain: &Domain, bytes: &[u8]) -> Digest {
    *domain.content_hasher().update(bytes).finalize().as_bytes()
}
