//! A VM of Cloud Hypervisor's in a store: each memory file an image, configuration and state as blobs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use dormouse_chunkstore::{
    BlobBytes, BlobSource, Image, ImageSource, Progress, Resume, Snapshot, StoreError,
};
use dormouse_core::{FormatError, ImageId, ImageKind};
use dormouse_restore::PageSource;
use dormouse_wake::StoredImage;

use super::memory::{MemorySlotsError, StoredIn, memory_slots};
use super::receive::Received;
use super::send::{LaidOut, SendError, lay_out, memory_file};
use dormouse_wake::Opened;

/// What the configuration is called in a snapshot: as the file is that Cloud Hypervisor's own daemon writes.
pub const CONFIG_ID: &str = "migration_config.json";
/// What the state of devices and vCPUs is called.
pub const STATE_ID: &str = "state.json";

/// Why a snapshot cannot be woken in Cloud Hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    /// It cannot be read, or is not of such a VM.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its slots make no sense.
    #[error(transparent)]
    Slots(#[from] MemorySlotsError),
    /// Its images are not those of its slots, or there is no memory for them.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// A VM that is stored.
#[derive(Clone, Debug)]
pub struct StoredVm {
    /// Its configuration.
    pub config: Vec<u8>,
    /// The state of its devices and vCPUs.
    pub state: Vec<u8>,
    /// Its memory.
    pub memory: Vec<(LaidOut, Image)>,
    /// With its resume stream, if it was opened to be resumed and has all its memory in one image.
    opened: Option<Opened>,
}

impl StoredVm {
    /// Reads all but the memory of the VM in `snapshot`.
    ///
    /// # Errors
    /// [`StoredError`].
    pub fn open(snapshot: &Snapshot) -> Result<Self, StoredError> {
        Self::with(snapshot, None)
    }

    /// As [`StoredVm::open`], with the snapshot's resume stream, which begins to be decoded.
    ///
    /// # Errors
    /// [`StoredError`].
    pub fn resumed(resume: Resume) -> Result<Self, StoredError> {
        let snapshot = resume.snapshot.clone();
        // One with several memory files has none called by that name, and no stream.
        let opened = Opened::of(resume).ok();
        if let Some(Err(why)) = opened.as_ref().map(|opened| opened.decode_ahead(false)) {
            tracing::warn!(%why, "the VM wakes without its resume stream");
        }
        Self::with(&snapshot, opened)
    }

    fn with(snapshot: &Snapshot, opened: Option<Opened>) -> Result<Self, StoredError> {
        let blob = |id| match &opened {
            Some(opened) => opened.state(id),
            None => snapshot.read_blob(id),
        };
        let (config, state) = (blob(CONFIG_ID)?, blob(STATE_ID)?);
        let images: Vec<(StoredIn, Image)> = snapshot
            .images()
            .filter(|image| image.entry().kind == ImageKind::Memory)
            .filter_map(|image| Some((StoredIn::parse(image.entry().id.as_str())?, image)))
            .collect();
        let lengths: Vec<_> =
            images.iter().map(|(name, image)| (name.clone(), image.entry().bytes)).collect();
        let laid_out = lay_out(&memory_slots(&config)?, &lengths)?;
        let with_image = |one: LaidOut| {
            let (_, image) = images.iter().find(|(name, _)| *name == one.image)?;
            Some((one, image.clone()))
        };
        let memory = laid_out.into_iter().filter_map(with_image).collect();
        Ok(Self { config, state, memory, opened })
    }

    /// With its resume stream, if it has all its memory in one image and was opened to be resumed.
    pub fn opened(&self) -> Option<&Opened> {
        self.opened.as_ref()
    }

    /// The memory as something a restore can read.
    pub fn sources(&self) -> Vec<(LaidOut, Arc<dyn PageSource>)> {
        let source = |(laid_out, image): &(LaidOut, Image)| {
            let source: Arc<dyn PageSource> = Arc::new(StoredImage::new(image.clone()));
            (laid_out.clone(), source)
        };
        self.memory.iter().map(source).collect()
    }

    /// Memory files that hold everything, with holes where it is zero.
    ///
    /// # Errors
    /// [`StoredError`].
    pub fn fill(&self, progress: &dyn Progress) -> Result<Vec<(LaidOut, File)>, StoredError> {
        let fill = |(laid_out, image): &(LaidOut, Image)| {
            let file = memory_file(&laid_out.image, laid_out.bytes)?;
            image.export_into(&file, progress)?;
            Ok((laid_out.clone(), file))
        };
        self.memory.iter().map(fill).collect()
    }
}

impl Received {
    /// What is to be imported. The memory is read from where it is, so keep `self` until it is.
    ///
    /// # Errors
    /// A name too long to be one, which no such VM has.
    pub fn parts(&self) -> Result<(Vec<ImageSource>, Vec<BlobSource>), FormatError> {
        let image = |memory: &super::receive::MemoryFile| {
            let path = format!("/proc/self/fd/{}", memory.file.as_raw_fd()).into();
            let id = ImageId::new(memory.image.to_string())?;
            Ok(ImageSource { id, kind: ImageKind::Memory, path, dirty: None })
        };
        let blob = |id: &str, bytes: &[u8]| {
            Ok(BlobSource { id: ImageId::new(id)?, bytes: BlobBytes::Memory(bytes.to_vec()) })
        };
        let images = self.memory.iter().map(image).collect::<Result<_, FormatError>>()?;
        Ok((images, vec![blob(CONFIG_ID, &self.config)?, blob(STATE_ID, &self.state)?]))
    }
}
