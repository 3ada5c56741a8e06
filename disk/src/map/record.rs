//! Records of a map file.

use dormouse_core::{
    FormatError,
    wire::{Reader, Writer},
};

use super::{Checksum, checksum};
use crate::states::{PageState, PageStates, StateRun};

/// Longest payload of a record.
pub const RUN_PAYLOAD_BYTES_MAX: usize = 64 << 10;
/// Runs in one record, at most: two varints of at most ten bytes each, and the count.
const RECORD_RUNS_MAX: usize = 3_000;
const PREFIX_BYTES: usize = 8;
const SUM_BYTES: usize = 16;
const WHAT: &str = "overlay map record";

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// A part of the states at the checkpoint.
    CheckpointStates = 1,
    /// The checkpoint is complete. Without it the file counts for nothing.
    CheckpointEnd = 2,
    /// States that a flush made durable.
    FlushStates = 3,
    /// The layer takes no more writes.
    Sealed = 4,
}

impl RecordKind {
    fn of(byte: u8) -> Option<Self> {
        [Self::CheckpointStates, Self::CheckpointEnd, Self::FlushStates, Self::Sealed]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Makes records, each checksummed over the one before.
#[derive(Clone, Debug)]
pub struct Encoder {
    sum: Checksum,
}

impl Encoder {
    /// Continues after the header or record with this checksum.
    pub fn after(sum: Checksum) -> Self {
        Encoder { sum }
    }

    /// One record with this payload, of at most [`RUN_PAYLOAD_BYTES_MAX`] bytes.
    pub fn record(&mut self, kind: RecordKind, payload: &[u8]) -> Vec<u8> {
        debug_assert!(payload.len() <= RUN_PAYLOAD_BYTES_MAX, "records are cut before they are too long");
        let mut out = Writer::new();
        out.u32(payload.len() as u32);
        out.u8(kind as u8);
        out.bytes(&[0; 3]);
        out.bytes(payload);
        let mut bytes = out.finish();
        self.sum = checksum(&[&self.sum, &bytes]);
        bytes.extend(self.sum);
        bytes
    }

    /// As many records of `kind` as `states` need; none for no states.
    pub fn states(&mut self, kind: RecordKind, states: &PageStates) -> Vec<u8> {
        let runs = states.runs();
        runs.chunks(RECORD_RUNS_MAX).flat_map(|part| self.record(kind, &encode_runs(part))).collect()
    }
}

fn encode_runs(runs: &[StateRun]) -> Vec<u8> {
    let mut out = Writer::new();
    out.varint(runs.len() as u64);
    let mut end = 0;
    for run in runs {
        out.varint(run.first - end);
        out.varint(run.pages << 1 | u64::from(run.state == PageState::Zero));
        end = run.first + run.pages;
    }
    out.finish()
}

/// The runs of a payload, all within a disk of `pages` pages, put into `states`.
pub fn decode_runs(payload: &[u8], pages: u64, states: &mut PageStates) -> Result<(), FormatError> {
    let mut reader = Reader::new(payload, WHAT);
    let count = reader.count("overlay map record's runs", RECORD_RUNS_MAX, 2)?;
    let mut runs = Vec::with_capacity(count);
    let mut end = 0u64;
    for _ in 0..count {
        let first = end.checked_add(reader.varint()?).filter(|first| *first < pages);
        let first = first.ok_or(reader.malformed("a run begins past the end of the disk"))?;
        let word = reader.varint()?;
        let state = if word & 1 == 1 { PageState::Zero } else { PageState::Present };
        if word >> 1 == 0 || word >> 1 > pages - first {
            return Err(reader.malformed("a run is empty or ends past the end of the disk"));
        }
        end = first + (word >> 1);
        runs.push(StateRun { first, pages: word >> 1, state });
    }
    reader.end()?;
    // Only a payload that is right as a whole says anything.
    for run in runs {
        states.set(run.first..run.first + run.pages, run.state);
    }
    Ok(())
}

/// The record that `bytes` begin with, if it continues `before`: kind, payload, its checksum and its length.
pub(super) fn next(bytes: &[u8], before: &Checksum) -> Option<(RecordKind, Vec<u8>, Checksum, usize)> {
    let mut reader = Reader::new(bytes, WHAT);
    let payload_bytes = reader.u32().ok()? as usize;
    let kind = RecordKind::of(reader.u8().ok()?)?;
    if payload_bytes > RUN_PAYLOAD_BYTES_MAX || reader.array::<3>().ok()? != [0; 3] {
        return None;
    }
    let payload = reader.bytes(payload_bytes).ok()?;
    let sum: Checksum = reader.array().ok()?;
    let whole = PREFIX_BYTES + payload_bytes;
    (checksum(&[before, &bytes[..whole]]) == sum).then(|| (kind, payload.to_vec(), sum, whole + SUM_BYTES))
}
