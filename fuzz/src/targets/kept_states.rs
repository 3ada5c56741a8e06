//! The file of kept page states: header, states, and events left behind.
use dormouse_restore::kept::layout::{HEADER_BYTES, Header, recovered, removed};

pub(crate) fn check(bytes: &[u8]) {
    if let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let file_bytes = rest.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        if let Ok(read) = Header::decode(header, file_bytes) {
            assert_eq!(read.encode(), *header);
            assert_eq!(read.file_bytes(), Some(file_bytes));
        }
    }
    for (cell, byte) in (0..).zip(bytes) {
        if let Ok(state) = recovered(cell, *byte) {
            assert_eq!(recovered(cell, state as u8), Ok(state));
        }
    }
    assert!(removed(bytes).count() <= bytes.len() / 32);
}
