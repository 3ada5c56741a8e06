//! Writes the map files of a layer.

use std::{io, sync::Arc};

use super::{Encoder, Header, RecordKind};
use crate::{file::DiskFile, states::PageStates};

/// A log shorter than this is not rewritten.
const LOG_BYTES_MIN: u64 = 256 << 10;

/// The open map of a layer. Not one method may be called again after one failed.
pub(crate) struct MapLog {
    files: [Arc<dyn DiskFile>; 2],
    /// The file in use.
    active: usize,
    header: Header,
    encoder: Encoder,
    end: u64,
    checkpoint_bytes: u64,
}

impl MapLog {
    /// Begins with a checkpoint of `states` in `files[into]`, durable on return. The other file is cut.
    pub(crate) fn begin(
        files: [Arc<dyn DiskFile>; 2],
        into: usize,
        header: Header,
        states: &PageStates,
    ) -> io::Result<Self> {
        let encoder = Encoder::after([0; 16]);
        let mut log = MapLog { files, active: 1 - into, header, encoder, end: 0, checkpoint_bytes: 0 };
        log.write_checkpoint(states)?;
        Ok(log)
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Whether the log is long enough to be worth a new checkpoint.
    pub(crate) fn is_long(&self) -> bool {
        self.end > LOG_BYTES_MIN.max(3 * self.checkpoint_bytes)
    }

    /// Appends what a flush made durable, and syncs it. Nothing to say is nothing to write.
    pub(crate) fn append(&mut self, states: &PageStates) -> io::Result<()> {
        let bytes = self.encoder.states(RecordKind::FlushStates, states);
        if bytes.is_empty() { Ok(()) } else { self.write(&bytes) }
    }

    /// Says that the layer takes no more writes, and syncs it.
    pub(crate) fn seal(&mut self) -> io::Result<()> {
        let bytes = self.encoder.record(RecordKind::Sealed, &[]);
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = &self.files[self.active];
        file.write_at(bytes, self.end)?;
        file.sync()?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Goes over to the other file, which holds nothing but `states` then.
    pub(crate) fn checkpoint(&mut self, states: &PageStates) -> io::Result<()> {
        self.header.generation += 1;
        self.header.nonce = random_nonce()?;
        self.write_checkpoint(states)
    }

    fn write_checkpoint(&mut self, states: &PageStates) -> io::Result<()> {
        let other = 1 - self.active;
        let (mut bytes, sum) = self.header.encode();
        self.encoder = Encoder::after(sum);
        bytes.extend(self.encoder.states(RecordKind::CheckpointStates, states));
        bytes.extend(self.encoder.record(RecordKind::CheckpointEnd, &[]));
        self.files[other].truncate(0)?;
        self.files[other].write_at(&bytes, 0)?;
        self.files[other].sync()?;
        // The new checkpoint is durable: the old file is worth nothing, whether or not this reaches the disk.
        self.files[self.active].truncate(0)?;
        self.active = other;
        self.end = bytes.len() as u64;
        self.checkpoint_bytes = self.end;
        Ok(())
    }
}

/// Sixteen bytes that no earlier map file has.
pub(crate) fn random_nonce() -> io::Result<[u8; 16]> {
    let mut nonce = [0; 16];
    let got = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    if got < nonce.len() {
        return Err(io::Error::other("the kernel gave too few random bytes"));
    }
    Ok(nonce)
}
