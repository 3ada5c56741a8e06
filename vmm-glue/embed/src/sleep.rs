//! Putting a machine on standby.

use dormouse_chunkstore::{
    BlobBytes, BlobSource, Dirty, ImageSource, ImportReport, ImportRequest, NoProgress, Store, StoreError,
};
use dormouse_core::{FormatError, ImageId, ImageKind, Name};
use dormouse_restore::PageRun;
use dormouse_wake::SessionRecord;
use vm_memory::GuestMemoryMmap;

use super::memory::{ImageFile, image_ranges};
use dormouse_vmm_common::DirtyRun;
use dormouse_wake::{MEMORY_ID, WORKING_SET_ID, build_predicted_stream, encode_working_set};

/// A machine about to go on standby. Its vCPUs must be paused until [`Sleep::store`] has returned.
#[derive(Clone, Debug)]
pub struct Sleep {
    request: ImportRequest,
    dirty: Option<Vec<DirtyRun>>,
    working_set: Vec<PageRun>,
}

/// Why a machine could not be put on standby. It is as it was, and so is the store.
#[derive(Debug, thiserror::Error)]
pub enum SleepError {
    /// The store would not have it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A name that cannot be one.
    #[error(transparent)]
    Name(#[from] FormatError),
    /// Guest memory cannot be read.
    #[error("guest memory cannot be read: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// No file for a copy of guest memory.
    #[error("no memory file for a copy of guest memory: {0}; is there memory left?")]
    File(std::io::Error),
    /// A dirty page where there is no memory.
    #[error("the page at {physical:#x} is said to be dirty, but no region of guest memory has it")]
    DirtyOutside {
        /// Its guest-physical address.
        physical: u64,
    },
}

impl Sleep {
    /// A machine to be stored as `name`, all of it.
    pub fn new(name: Name) -> Self {
        Self { request: ImportRequest::new(name), dirty: None, working_set: Vec::new() }
    }

    /// What the machine was woken from: what they share is not stored again. May be the machine's own name,
    /// which then moves on to the new generation.
    pub fn parent(mut self, parent: Name) -> Self {
        self.request.parent = Some(parent);
        self
    }

    /// Device state, given back as it is by [`dormouse_chunkstore::Snapshot::read_blob`].
    pub fn state(mut self, id: ImageId, bytes: Vec<u8>) -> Self {
        self.request.blobs.push(BlobSource { id, bytes: BlobBytes::Memory(bytes) });
        self
    }

    /// The pages written since the machine was woken from its parent, by the guest and by the VMM alike: only
    /// these are read.
    pub fn dirty(mut self, dirty: Vec<DirtyRun>) -> Self {
        self.dirty = Some(dirty);
        self
    }

    /// What the machine touched in this session, in order (see [`super::Woken::working_set`]): it comes first when
    /// the machine is woken. Together with the pages that are dirty it also becomes the resume stream.
    pub fn working_set(mut self, runs: Vec<PageRun>) -> Self {
        self.working_set = runs;
        self
    }

    /// Stores the machine, whose memory is `memory`: its regions become one image, in guest-physical order.
    /// When this returns it is durable, and the process may end.
    ///
    /// Memory made by [`super::memory()`] is read in place, other memory is copied first, dirty pages only if
    /// those are known.
    ///
    /// # Errors
    /// [`SleepError`]; nothing then refers to what was stored. Unless it is [`StoreError::InDoubt`]: then the name may stand
    /// for it, and the machine must not run on before that is known.
    ///
    /// [`StoreError::InDoubt`]: dormouse_chunkstore::StoreError::InDoubt
    pub fn store(mut self, store: &Store, memory: &GuestMemoryMmap) -> Result<ImportReport, SleepError> {
        let dirty_pages = self.dirty.as_deref().map(|runs| image_ranges(memory, runs)).transpose()?;
        let image = ImageFile::of(memory, dirty_pages.as_deref())?;
        self.request.images.push(ImageSource {
            id: ImageId::new(MEMORY_ID)?,
            kind: ImageKind::Memory,
            path: image.path(),
            dirty: dirty_pages.clone().map(Dirty::Ranges),
        });
        if !self.working_set.is_empty() {
            self.request.blobs.push(BlobSource {
                id: ImageId::new(WORKING_SET_ID)?,
                bytes: BlobBytes::Memory(encode_working_set(&self.working_set)),
            });
        }
        let report = store.import(&self.request, &NoProgress)?;
        if !self.working_set.is_empty() {
            let dirtied = dirty_pages.as_deref().unwrap_or_default();
            let missed = self.working_set.iter().map(|run| (run.first.0, run.pages)).collect();
            let session = SessionRecord { missed, ..Default::default() };
            // The machine is durable, and wakes without it.
            if let Err(why) = build_predicted_stream(store, &self.request.name, Some(&session), dirtied) {
                tracing::warn!(%why, "the machine has no resume stream: it wakes more slowly");
            }
        }
        Ok(report)
    }
}
