//! Varints and bounded reads.
#![allow(clippy::unwrap_used)]

use dormouse_core::{
    FormatError,
    wire::{Reader, Writer},
};
use proptest::prelude::*;

fn varint(v: u64) -> Vec<u8> {
    let mut w = Writer::new();
    w.varint(v);
    w.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn varints_come_back(v in any::<u64>(), shift in 0u32..64) {
        let v = v >> shift;
        let bytes = varint(v);
        prop_assert_eq!(bytes.len(), (64 - v.leading_zeros()).div_ceil(7).max(1) as usize);
        let mut r = Reader::new(&bytes, "test");
        prop_assert_eq!(r.varint(), Ok(v));
        prop_assert_eq!(r.end(), Ok(()));
        for cut in 0..bytes.len() {
            prop_assert_eq!(Reader::new(&bytes[..cut], "test").varint(), Err(FormatError::Truncated("test")));
        }
    }

    #[test]
    fn zigzags_come_back(v in any::<i64>(), shift in 0u32..64) {
        let v = v >> shift;
        let mut w = Writer::new();
        w.zigzag(v);
        prop_assert_eq!(Reader::new(&w.finish(), "test").zigzag(), Ok(v));
    }

    #[test]
    fn a_varint_has_one_form(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
        let mut r = Reader::new(&bytes, "test");
        if let Ok(v) = r.varint() {
            prop_assert_eq!(&varint(v), &bytes[..bytes.len() - r.remaining()]);
        }
    }
}

#[test]
fn the_ends_of_the_ranges() {
    for v in [0, 0x7F, 0x80, 0x3FFF, 0x4000, u64::MAX >> 1, u64::MAX] {
        assert_eq!(Reader::new(&varint(v), "test").varint(), Ok(v));
    }
    for v in [0, -1, 1, i64::MIN, i64::MAX] {
        let mut w = Writer::new();
        w.zigzag(v);
        assert_eq!(Reader::new(&w.finish(), "test").zigzag(), Ok(v));
    }
}

#[test]
fn long_and_padded_varints_are_refused() {
    let refused =
        |bytes: &[u8]| matches!(Reader::new(bytes, "test").varint(), Err(FormatError::Malformed { .. }));
    assert!(refused(&[0x80, 0]), "padded by a zero");
    assert!(refused(&[0xFF, 0x80, 0]), "padded by a zero");
    assert!(refused(&[&[0xFF; 9][..], &[2]].concat()), "65 bits");
    assert!(refused(&[&[0xFF; 9][..], &[0x81, 0]].concat()), "eleven bytes");
    assert!(refused(&[&[0x80; 9][..], &[0]].concat()), "ten bytes of nothing");
}

#[test]
fn a_count_is_bounded_by_its_limit_and_by_what_is_left() {
    let count = |n: u64, rest: usize| {
        let bytes = [varint(n), vec![0; rest]].concat();
        Reader::new(&bytes, "test").count("things", 100, 8)
    };
    assert_eq!(count(3, 24), Ok(3));
    assert_eq!(count(3, 23), Err(FormatError::Truncated("test")));
    assert_eq!(count(101, 5000), Err(FormatError::OverLimit { what: "things", value: 101, limit: 100 }));
    let value = u64::MAX;
    assert_eq!(count(value, 0), Err(FormatError::OverLimit { what: "things", value, limit: 100 }));
    let bytes = varint(u64::MAX);
    let unlimited = Reader::new(&bytes, "test").count("things", usize::MAX, 8);
    assert_eq!(unlimited, Err(FormatError::Truncated("test")));
}

#[test]
fn counted_bytes_do_not_reach_past_the_end() {
    let mut w = Writer::new();
    w.counted(b"abc");
    let bytes = w.finish();
    assert_eq!(Reader::new(&bytes, "test").counted("bytes", 3), Ok(&b"abc"[..]));
    assert!(matches!(Reader::new(&bytes, "test").counted("bytes", 2), Err(FormatError::OverLimit { .. })));
    assert_eq!(Reader::new(&bytes[..3], "test").counted("bytes", 3), Err(FormatError::Truncated("test")));
}
