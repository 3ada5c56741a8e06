//! What is to be imported, and what came of it.

use std::{ops::Range, path::PathBuf};

use dormouse_core::{ImageId, ImageKind, Name, SnapshotId};
use serde::{Deserialize, Serialize};

/// The compression level of fresh frames; see `docs/DENSITY.md` for what each level buys.
pub const DEFAULT_LEVEL: i32 = 6;

/// Which pages of an image file differ from the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// These ranges of pages; everything else is as in the parent, and is not read.
    Ranges(Vec<Range<u64>>),
    /// A bit for each page, the lowest bit of the first byte for the first page, as KVM's dirty log has them; bytes
    /// may be added up to the next multiple of eight, whose bits are zero.
    Bitmap(Vec<u8>),
    /// Whatever the file has data for; its holes are as in the parent (Firecracker's diff snapshots).
    FileData,
}

/// An image to import.
#[derive(Clone, Debug)]
pub struct ImageSource {
    /// What it is called in the snapshot; an image of this name and kind in the parent is what it is compared to.
    pub id: ImageId,
    /// Memory or disk.
    pub kind: ImageKind,
    /// The file; holes cost nothing.
    pub path: PathBuf,
    /// What differs from the parent; `None` to compare all of it.
    pub dirty: Option<Dirty>,
}

/// Where the bytes of a device-state blob come from.
#[derive(Clone, Debug)]
pub enum BlobBytes {
    /// A file.
    File(PathBuf),
    /// Memory.
    Memory(Vec<u8>),
}

/// A device-state blob to import.
#[derive(Clone, Debug)]
pub struct BlobSource {
    /// What it is called in the snapshot.
    pub id: ImageId,
    /// Its bytes.
    pub bytes: BlobBytes,
}

/// A snapshot to make.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The name it gets.
    pub name: Name,
    /// The snapshot it was made from, if any.
    pub parent: Option<Name>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Memory and disks.
    pub images: Vec<ImageSource>,
    /// Device state.
    pub blobs: Vec<BlobSource>,
    /// zstd level for new frames.
    pub level: i32,
    /// Whether the name may be one that exists already. It always may if it is the parent's.
    pub replace: bool,
    /// Whether files may be written to while they are read: what is stored then may be a state that never was. Without
    /// it such an import fails with [`StoreError::Changed`](crate::StoreError::Changed).
    pub allow_changing: bool,
    /// When the snapshot may be dropped, milliseconds since 1970 UTC; 0 for never.
    pub expires_unix_ms: u64,
}

impl ImportRequest {
    /// A request without parent, labels or expiry, at the default level.
    pub fn new(name: Name) -> Self {
        ImportRequest {
            name,
            parent: None,
            labels: Vec::new(),
            images: Vec::new(),
            blobs: Vec::new(),
            level: DEFAULT_LEVEL,
            replace: false,
            allow_changing: false,
            expires_unix_ms: 0,
        }
    }
}

/// What an import did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImportReport {
    /// The name.
    pub name: String,
    /// The snapshot's identity.
    pub snapshot: String,
    /// Bytes of all images.
    pub logical_bytes: u64,
    /// Bytes in pages that are not zero.
    pub nonzero_bytes: u64,
    /// Bytes in pages that were not in the store before.
    pub new_bytes: u64,
    /// Bytes in pages that were in the store, but strewn over many packs, and are stored once more, together.
    pub gathered_bytes: u64,
    /// Requests that read those pages.
    pub gathered_reads: u64,
    /// Bytes written to the store, everything included.
    pub stored_bytes: u64,
    /// Objects written to the store, the reference included.
    pub objects: u64,
    /// Bytes read from the image files.
    pub read_bytes: u64,
}

impl ImportReport {
    pub(crate) fn of(name: &Name, id: SnapshotId) -> Self {
        ImportReport { name: name.to_string(), snapshot: id.to_string(), ..Default::default() }
    }
}
