//! What the map files of a layer say after any crash.

use dormouse_core::FormatError;

use super::{
    header::{HEADER_BYTES, Header},
    record::{RecordKind, decode_runs, next},
};
use crate::states::PageStates;

/// Why no map could be recovered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The file holds no complete checkpoint: it was never finished, or it was cut, or it is damaged.
    #[error("no complete checkpoint: {0}")]
    Incomplete(FormatError),
    /// The file is of a later version or has unknown flags. It must not be written over.
    #[error("{0}")]
    Foreign(FormatError),
}

/// What one map file says.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Its header.
    pub header: Header,
    /// The states at the last flush that the file knows.
    pub states: PageStates,
    /// Whether the layer was sealed.
    pub sealed: bool,
    /// Records of flushes after the checkpoint.
    pub flush_records: u64,
    /// Bytes that are whole; what follows is a torn tail.
    pub whole_bytes: usize,
}

/// Reads one map file as far as it is whole. Never panics, whatever the bytes.
pub fn recover(bytes: &[u8]) -> Result<Recovered, MapError> {
    let (header, mut sum) = Header::decode(bytes).map_err(|why| match why {
        FormatError::TooNew { .. } | FormatError::UnknownFlags { .. } => MapError::Foreign(why),
        why => MapError::Incomplete(why),
    })?;
    let pages = header.identity.pages();
    let mut states = PageStates::new();
    let (mut complete, mut sealed, mut flush_records, mut at) = (false, false, 0, HEADER_BYTES);
    while let Some((kind, payload, after, length)) = next(&bytes[at..], &sum) {
        let means_something = match kind {
            RecordKind::CheckpointStates if !complete => decode_runs(&payload, pages, &mut states).is_ok(),
            RecordKind::CheckpointEnd if !complete && payload.is_empty() => {
                complete = true;
                true
            }
            RecordKind::FlushStates if complete && !sealed => {
                flush_records += 1;
                decode_runs(&payload, pages, &mut states).is_ok()
            }
            RecordKind::Sealed if complete && !sealed && payload.is_empty() => {
                sealed = true;
                true
            }
            _ => false,
        };
        if !means_something {
            break;
        }
        (sum, at) = (after, at + length);
    }
    if !complete {
        return Err(MapError::Incomplete(FormatError::Truncated("overlay map")));
    }
    Ok(Recovered { header, states, sealed, flush_records, whole_bytes: at })
}

/// What both map files of a layer say together: the complete one of the higher generation, and which file that is.
pub fn recover_newest(files: [&[u8]; 2]) -> Result<(Recovered, usize), MapError> {
    let [first, second] = files.map(recover);
    match (first, second) {
        (Err(MapError::Foreign(why)), _) | (_, Err(MapError::Foreign(why))) => Err(MapError::Foreign(why)),
        (Ok(a), Ok(b)) if b.header.generation > a.header.generation => Ok((b, 1)),
        (Ok(a), _) => Ok((a, 0)),
        (_, Ok(b)) => Ok((b, 1)),
        (Err(why), Err(_)) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        map::{Encoder, Identity},
        states::PageState,
    };

    fn header(generation: u64) -> Header {
        let identity =
            Identity { snapshot: [7; 32], image: "root".into(), size_bytes: 1 << 20, owner_token: 3 };
        Header { identity, generation, nonce: [generation as u8; 16], layer: 2, beneath: 1 }
    }

    fn set(first: u64, pages: u64, state: PageState) -> PageStates {
        let mut states = PageStates::new();
        states.set(first..first + pages, state);
        states
    }

    /// A checkpoint with page 0, flushes of pages 1 to 3, and where each ends.
    fn file(generation: u64) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, sum) = header(generation).encode();
        let mut encoder = Encoder::after(sum);
        bytes.extend(encoder.states(RecordKind::CheckpointStates, &set(0, 1, PageState::Present)));
        bytes.extend(encoder.record(RecordKind::CheckpointEnd, &[]));
        let mut ends = vec![bytes.len()];
        for page in 1..4 {
            bytes.extend(encoder.states(RecordKind::FlushStates, &set(page, 1, PageState::Zero)));
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn map_cut_anywhere_keeps_whole_flushes() {
        let (bytes, ends) = file(1);
        for cut in 0..=bytes.len() {
            let found = recover(&bytes[..cut]);
            let Some(flushes) = ends.iter().filter(|end| **end <= cut).count().checked_sub(1) else {
                assert!(matches!(found, Err(MapError::Incomplete(_))), "cut at {cut}");
                continue;
            };
            let found = found.unwrap();
            assert_eq!((found.flush_records, found.whole_bytes), (flushes as u64, ends[flushes]));
            assert_eq!(found.states.count(PageState::Zero), flushes as u64);
        }
    }

    #[test]
    fn flipped_bit_never_changes_what_is_read() {
        let (bytes, ends) = file(1);
        let whole = recover(&bytes).unwrap().states.runs();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Ok(found) = recover(&damaged) else { continue };
            assert!(found.whole_bytes <= bit / 8 && bit / 8 >= ends[0], "bit {bit}");
            assert!(found.states.runs() != whole);
        }
    }

    #[test]
    fn remains_of_an_older_log_are_not_read() {
        let (old, ends) = file(1);
        let (mut bytes, _) = file(2);
        bytes.truncate(ends[1]);
        bytes.extend(&old[ends[1]..]);
        assert_eq!(recover(&bytes).unwrap().flush_records, 1);
    }

    #[test]
    fn newer_complete_checkpoint_is_the_one_used() {
        let ((old, _), (new, ends)) = (file(1), file(2));
        let generation = |a: &[u8], b: &[u8]| recover_newest([a, b]).map(|(r, at)| (r.header.generation, at));
        assert_eq!(generation(&old, &new), Ok((2, 1)));
        assert_eq!(generation(&new, &old), Ok((2, 0)));
        assert_eq!(generation(&old, &new[..ends[0] - 1]), Ok((1, 0)));
        assert_eq!(generation(&[], &old), Ok((1, 1)));
        assert!(generation(&[], &new[..ends[0] - 1]).is_err());
    }

    #[test]
    fn map_of_a_later_version_is_refused() {
        let (mut bytes, _) = file(1);
        bytes[8] = 2;
        let sum = super::super::checksum(&[&bytes[..240]]);
        bytes[240..256].copy_from_slice(&sum);
        let (old, _) = file(9);
        assert!(matches!(recover_newest([&bytes, &old]), Err(MapError::Foreign(_))));
    }

    #[test]
    fn nothing_follows_a_seal() {
        let (mut bytes, sum) = header(1).encode();
        let mut encoder = Encoder::after(sum);
        bytes.extend(encoder.record(RecordKind::CheckpointEnd, &[]));
        bytes.extend(encoder.record(RecordKind::Sealed, &[]));
        let whole_bytes = bytes.len();
        bytes.extend(encoder.states(RecordKind::FlushStates, &set(5, 1, PageState::Present)));
        let found = recover(&bytes).unwrap();
        assert!(found.sealed && found.states.is_empty());
        assert_eq!(found.whole_bytes, whole_bytes);
    }

    #[test]
    fn runs_outside_the_disk_mean_nothing() {
        let mut states = PageStates::new();
        for payload in [&[1, 200, 1, 2][..], &[1, 0, 0], &[1, 250, 1, 20], &[2, 0, 2], &[1, 0, 2, 0]] {
            assert!(decode_runs(payload, 256, &mut states).is_err() || payload == [1, 200, 1, 2]);
        }
        assert_eq!(states.count(PageState::Present), 1);
    }
}
