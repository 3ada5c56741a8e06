//! A pack's trailer: where it says the footer lies is inside the pack.
use dormouse_core::{Domain, PackId, limits::PACK_BYTES_MAX, pack};

use crate::input::Input;

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (object_bytes, before, small) = (input.u64(), input.array::<36>(), input.bool());
    let object_bytes = if small { object_bytes % (PACK_BYTES_MAX * 2) } else { object_bytes };
    let mut trailer = before.to_vec();
    trailer.extend_from_slice(&blake3::hash(&before).as_bytes()[..4]);
    if let Ok(pack) = pack::parse_trailer(&Domain::plain(), PackId([0; 32]), object_bytes, &trailer) {
        assert_eq!(pack.object_bytes(), object_bytes);
        assert!(pack.footer_range().start >= pack::HEADER_BYTES as u64);
        assert!(pack.footer_range().end < object_bytes);
    }
    let _ = pack::parse_trailer(&Domain::plain(), PackId([0; 32]), object_bytes, &before);
}
