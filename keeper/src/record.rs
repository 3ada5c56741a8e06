//! What is known of a kept VM besides its descriptors: a small JSON document, and a pure parser of it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use dormouse_core::{OnFailure, Retry, SnapshotId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::regions::{Region, RegionsError, parse_regions};

/// Most bytes a record may have.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;
/// The version written, and the only one read.
pub const RECORD_VERSION: u32 = 1;
/// Most bytes an id may have.
const ID_BYTES_MAX: usize = 64;

/// Names a kept VM: letters, digits, `-`, `.` and `_`. Never used twice.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    /// Reads an id.
    ///
    /// # Errors
    /// [`RecordError::Id`].
    pub fn new(text: &str) -> Result<Self, RecordError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        let fits = !text.is_empty() && text.len() <= ID_BYTES_MAX && text.bytes().all(good);
        fits.then(|| VmId(text.to_owned())).ok_or(RecordError::Id)
    }

    /// One that no other VM has: the number of its process, and chance.
    ///
    /// # Errors
    /// The kernel has no random numbers to give.
    pub fn for_process(pid: i32) -> std::io::Result<Self> {
        let mut chance = [0; 8];
        rustix::rand::getrandom(&mut chance, rustix::rand::GetRandomFlags::empty())?;
        Ok(VmId(format!("vm-{pid}-{:016x}", u64::from_ne_bytes(chance))))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VmId {
    type Error = RecordError;
    fn try_from(text: String) -> Result<Self, RecordError> {
        VmId::new(&text)
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> String {
        id.0
    }
}

/// Which snapshot a VM was woken from: that very one, whatever its name stands for later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSnapshot {
    /// What it was called.
    pub name: String,
    /// Its id, in hexadecimal.
    pub snapshot: String,
    /// The reference it was opened by, as stored, in hexadecimal.
    pub reference: String,
}

impl KeptSnapshot {
    /// Its id.
    pub fn id(&self) -> Option<SnapshotId> {
        SnapshotId::from_hex(&self.snapshot)
    }
}

/// How a kept VM is served, as far as its next server must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptOptions {
    /// What is done when a page cannot be had correctly.
    pub on_failure: OnFailure,
    /// How long a fetch that fails is repeated before that.
    pub retry: Retry,
    /// Whether pages that nobody asked for are installed in the background.
    pub prefetch: bool,
}

impl Default for KeptOptions {
    fn default() -> Self {
        Self { on_failure: OnFailure::default(), retry: Retry::default(), prefetch: true }
    }
}

/// What is known of a kept VM.
#[derive(Clone, Debug)]
pub struct VmRecord {
    /// Names it.
    pub id: VmId,
    /// What it was woken from.
    pub snapshot: KeptSnapshot,
    /// Its memory.
    pub regions: Vec<Region>,
    /// How it is served.
    pub options: KeptOptions,
    /// The VMM's process.
    pub pid: i32,
    /// That process's user.
    pub uid: u32,
    /// The VMM's API socket, if that is known.
    pub api_socket: Option<PathBuf>,
    /// Whatever else its server wants to find again.
    pub notes: BTreeMap<String, String>,
}

/// Why bytes are not a record, or a record cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Too long.
    #[error("the record of a kept VM has {bytes} bytes, more than the {RECORD_BYTES_MAX} allowed")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// Not JSON, or not this document.
    #[error("the record of a kept VM makes no sense: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version's.
    #[error("the record of a kept VM has version {found}, this program reads version {RECORD_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Not an id.
    #[error("the id of a kept VM has 1 to {ID_BYTES_MAX} letters, digits, '-', '.' or '_'")]
    Id,
    /// Its regions are no usable memory.
    #[error("the record of a kept VM: {0}")]
    Regions(#[from] RegionsError),
}

#[derive(Serialize, Deserialize)]
struct Wire {
    version: u32,
    id: VmId,
    snapshot: KeptSnapshot,
    /// As Firecracker sends it, and parsed by the same parser.
    regions: Value,
    options: WireOptions,
    pid: i32,
    uid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_socket: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    notes: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct WireOptions {
    kill: bool,
    retry_limit: u32,
    retry_first_ms: u64,
    retry_longest_ms: u64,
    prefetch: bool,
}

impl From<KeptOptions> for WireOptions {
    fn from(options: KeptOptions) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        WireOptions {
            kill: options.on_failure == OnFailure::Kill,
            retry_limit: options.retry.limit,
            retry_first_ms: ms(options.retry.first),
            retry_longest_ms: ms(options.retry.longest),
            prefetch: options.prefetch,
        }
    }
}

impl From<WireOptions> for KeptOptions {
    fn from(wire: WireOptions) -> Self {
        KeptOptions {
            on_failure: if wire.kill { OnFailure::Kill } else { OnFailure::Hold },
            retry: Retry {
                limit: wire.retry_limit,
                first: Duration::from_millis(wire.retry_first_ms),
                longest: Duration::from_millis(wire.retry_longest_ms),
            },
            prefetch: wire.prefetch,
        }
    }
}

impl VmRecord {
    /// Its bytes.
    ///
    /// # Errors
    /// [`RecordError::TooLong`].
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let region = |r: &Region| {
            serde_json::json!({
                "base_host_virt_addr": r.host,
                "size": r.bytes,
                "offset": r.offset,
                "page_size": r.page_size.bytes(),
            })
        };
        let wire = Wire {
            version: RECORD_VERSION,
            id: self.id.clone(),
            snapshot: self.snapshot.clone(),
            regions: self.regions.iter().map(region).collect(),
            options: self.options.into(),
            pid: self.pid,
            uid: self.uid,
            api_socket: self.api_socket.clone(),
            notes: self.notes.clone(),
        };
        let bytes = serde_json::to_vec(&wire)?;
        match bytes.len() {
            0..=RECORD_BYTES_MAX => Ok(bytes),
            bytes => Err(RecordError::TooLong { bytes }),
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(RecordError::TooLong { bytes: bytes.len() });
        }
        let found = serde_json::from_slice::<Versioned>(bytes)?.version;
        if found != RECORD_VERSION {
            return Err(RecordError::Version { found });
        }
        let wire: Wire = serde_json::from_slice(bytes)?;
        Ok(VmRecord {
            regions: parse_regions(&serde_json::to_vec(&wire.regions)?)?,
            id: wire.id,
            snapshot: wire.snapshot,
            options: wire.options.into(),
            pid: wire.pid,
            uid: wire.uid,
            api_socket: wire.api_socket,
            notes: wire.notes,
        })
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
