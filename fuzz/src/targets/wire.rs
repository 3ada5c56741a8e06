//! Varints: one form for each value.
use dormouse_core::wire::{Reader, Writer};

pub(crate) fn check(bytes: &[u8]) {
    let mut r = Reader::new(bytes, "test");
    let mut w = Writer::new();
    while let Ok(v) = r.clone().varint() {
        assert_eq!(r.varint(), Ok(v));
        w.varint(v);
        assert_eq!(w.finish(), bytes[..bytes.len() - r.remaining()]);
        w = Writer::new();
        w.bytes(&bytes[..bytes.len() - r.remaining()]);
    }
    let mut r = Reader::new(bytes, "test");
    if let Ok(v) = r.zigzag() {
        let mut w = Writer::new();
        w.zigzag(v);
        assert_eq!(w.finish(), bytes[..bytes.len() - r.remaining()]);
    }
    let mut r = Reader::new(bytes, "test");
    if let Ok(n) = r.count("things", usize::MAX, 3) {
        assert!(n * 3 <= r.remaining());
    }
}
