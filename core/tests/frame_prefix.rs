//! A frame decoded bit by bit is the frame decoded at once, and what is no frame is refused at the same place.
#![allow(clippy::unwrap_used, reason = "tests")]

use dormouse_core::{
    Codec, Domain, DomainKey, FormatError, FrameHash, FramePrefix, FrameRef, PAGE_BYTES, frame::EncodedFrame,
};
use proptest::prelude::*;

fn reference(frame: &EncodedFrame) -> FrameRef {
    let (stored_bytes, raw_bytes) = (frame.stored.len() as u32, frame.raw_bytes);
    FrameRef { pack: 0, offset: 0, stored_bytes, raw_bytes, codec: frame.codec, hash: frame.hash }
}

/// By zstd at a level, or for speed.
fn encoded(domain: &Domain, raw: &[u8], level: Option<i32>) -> EncodedFrame {
    match level {
        Some(level) => EncodedFrame::encode(domain, raw, level),
        None => EncodedFrame::encode_for_speed(domain, raw),
    }
}

/// Pages of all natures: some compress to nothing, some not at all.
fn pages(seeds: &[u8]) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let page = |seed: &u8| -> Vec<u8> {
        let noise = usize::from(*seed) * 16;
        (0..PAGE_BYTES).map(|at| if at < noise { random() as u8 } else { *seed }).collect()
    };
    seeds.iter().flat_map(page).collect()
}

fn domains() -> [Domain; 2] {
    [Domain::plain(), Domain::encrypted(&DomainKey::new([7; 32]))]
}

fn begin(domain: &Domain, at: &FrameRef, stored: &[u8]) -> Result<FramePrefix, FormatError> {
    at.begin(domain, stored.to_vec(), vec![0xEE; 10])
}

proptest! {
    #[test]
    fn each_prefix_is_that_of_the_whole(
        seeds in prop::collection::vec(0u8..=255, 1..=32),
        level in prop::sample::select(vec![Some(-1), Some(3), Some(6), Some(15), None]),
        stops in prop::collection::vec(0usize..=32 * PAGE_BYTES + 9, 0..6),
    ) {
        let raw = pages(&seeds);
        for domain in domains() {
            let frame = encoded(&domain, &raw, level);
            let mut prefix = begin(&domain, &reference(&frame), &frame.stored).unwrap();
            prop_assert_eq!(prefix.raw_bytes(), raw.len());
            for stop in &stops {
                prefix.reach(*stop).unwrap();
                prop_assert!(prefix.bytes().len() >= (*stop).min(raw.len()));
                prop_assert_eq!(prefix.bytes(), &raw[..prefix.bytes().len()]);
            }
            prefix.reach(raw.len()).unwrap();
            prop_assert!(prefix.is_whole());
            prop_assert_eq!(prefix.into_buffers().0, &raw[..]);
        }
    }

    /// The hash is right, the frame is not: as from a writer with a fault.
    #[test]
    fn what_one_decoder_refuses_the_other_refuses(
        seeds in prop::collection::vec(0u8..=255, 1..=32),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
        cut in any::<bool>(),
        level in prop::sample::select(vec![Some(6), None]),
    ) {
        let (domain, raw) = (Domain::plain(), pages(&seeds));
        let frame = encoded(&domain, &raw, level);
        let mut stored = frame.stored.clone();
        let at = at.index(stored.len());
        if cut { stored.truncate(at.max(1)) } else { stored[at] ^= 1 << bit }
        let (stored_bytes, hash) = (stored.len() as u32, FrameHash::of(&stored));
        let reference = FrameRef { stored_bytes, hash, ..reference(&frame) };
        let whole = reference.decode(&domain, &stored).ok();
        let by_bits = begin(&domain, &reference, &stored).and_then(|mut prefix| {
            prefix.reach(PAGE_BYTES)?;
            prefix.reach(raw.len())?;
            assert!(prefix.is_whole());
            Ok(prefix.into_buffers().0)
        });
        prop_assert_eq!(by_bits.ok(), whole);
    }
}

#[test]
fn a_first_page_needs_an_eighth_of_a_full_frame() {
    let raw = pages(&[100; 32]);
    let frame = EncodedFrame::encode(&Domain::plain(), &raw, 6);
    assert_eq!(frame.codec, Codec::Zstd);
    let mut prefix = begin(&Domain::plain(), &reference(&frame), &frame.stored).unwrap();
    assert_eq!(prefix.bytes(), []);
    prefix.reach(1).unwrap();
    assert_eq!(prefix.bytes().len(), raw.len() / 8);
    prefix.reach(17 * PAGE_BYTES).unwrap();
    assert_eq!(prefix.bytes().len(), raw.len() / 8 * 5);
    assert!(!prefix.is_whole());
}

/// Frames of LZ4 have no header to tell: the size their reference gives must be right to the byte, and a buffer used again
/// shows nothing of what was in it.
#[test]
fn a_frame_for_speed_is_of_its_size_or_none() {
    for raw in [pages(&[100; 32]), vec![0; 64 * PAGE_BYTES], pages(&[3])] {
        let frame = EncodedFrame::encode_for_speed(&Domain::plain(), &raw);
        assert_eq!(frame.codec, Codec::Lz4);
        let right = reference(&frame);
        let mut buffer = vec![0xEE; raw.len() * 2];
        right.decode_into(&Domain::plain(), &frame.stored, &mut buffer).unwrap();
        assert!(buffer == raw);
        for wrong in [1, raw.len() - 1, raw.len() + 1, 4 << 20] {
            let at = FrameRef { raw_bytes: wrong as u32, ..right };
            let refused = Some(FormatError::Undecodable("frame"));
            assert_eq!(at.decode(&Domain::plain(), &frame.stored).err(), refused, "{wrong}");
            assert_eq!(begin(&Domain::plain(), &at, &frame.stored).err(), refused, "{wrong}");
        }
    }
    let noise = pages(&[255]);
    assert_eq!(EncodedFrame::encode_for_speed(&Domain::plain(), &noise).codec, Codec::Raw);
}

#[test]
fn nothing_is_decoded_of_a_frame_that_is_not_what_was_stored() {
    let frame = EncodedFrame::encode(&Domain::plain(), &pages(&[100; 4]), 6);
    for at in 0..frame.stored.len() {
        let mut stored = frame.stored.clone();
        stored[at] ^= 1;
        let refused = begin(&Domain::plain(), &reference(&frame), &stored).err();
        assert_eq!(refused, Some(FormatError::HashMismatch("frame")));
    }
    let short = begin(&Domain::plain(), &reference(&frame), &frame.stored[1..]).err();
    assert_eq!(short, Some(FormatError::Truncated("frame")));
}
