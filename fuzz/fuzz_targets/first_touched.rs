//! The blob of pages that a machine of an own VMM touched first.
#![no_main]
use dormouse_wake::decode_working_set;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = decode_working_set(bytes);
    let head = [b"DORMWSET", &[1, 0, 0, 0][..], &(bytes.len() as u32 / 12).to_le_bytes()].concat();
    if let Ok(runs) = decode_working_set(&[&head, bytes].concat()) {
        assert_eq!(runs.len() * 12, bytes.len());
    }
});
