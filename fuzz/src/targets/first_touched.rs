//! The blob of pages that a machine of an own VMM touched first.
use dormouse_wake::decode_working_set;

pub(crate) fn check(bytes: &[u8]) {
    let _ = decode_working_set(bytes);
    let head = [b"DORMWSET", &[1, 0, 0, 0][..], &(bytes.len() as u32 / 12).to_le_bytes()].concat();
    if let Ok(runs) = decode_working_set(&[&head, bytes].concat()) {
        assert_eq!(runs.len() * 12, bytes.len());
    }
}
