//! Frames and packs: round trips, and packs that stay within the limits whatever is put into them.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_core::{
    frame::EncodedFrame,
    limits::*,
    pack::{FrameKind, check_object, parse_trailer},
    *,
};
use proptest::prelude::*;

/// A frame's kind and raw bytes, some of which compress.
fn frames() -> impl Strategy<Value = Vec<(FrameKind, Vec<u8>)>> {
    let bytes = |seed: u64, len: usize, repeats: bool| {
        if repeats {
            noise(seed, len.min(50)).into_iter().cycle().take(len).collect()
        } else {
            noise(seed, len)
        }
    };
    let frame = prop_oneof![
        (any::<u64>(), 1usize..=8, any::<bool>())
            .prop_map(move |(s, pages, r)| (FrameKind::Pages, bytes(s, pages * PAGE_BYTES, r))),
        (any::<u64>(), 1usize..5000, any::<bool>())
            .prop_map(move |(s, len, r)| (FrameKind::Section, bytes(s, len, r))),
        (any::<u64>(), 1usize..5000, any::<bool>())
            .prop_map(move |(s, len, r)| (FrameKind::Blob, bytes(s, len, r))),
    ];
    prop::collection::vec(frame, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pack_gives_back_every_frame(frames in frames(), level in 1i32..10) {
        for domain in domains() {
            let mut builder = PackBuilder::new(&domain);
            prop_assert!(builder.is_empty());
            let mut refs = vec![];
            for (kind, raw) in &frames {
                let pages = if *kind == FrameKind::Pages { &raw[..] } else { &[] };
                let chunks = pages.chunks(PAGE_BYTES).map(|p| domain.chunk_id(p)).collect();
                refs.push(builder.push(*kind, &EncodedFrame::encode(&domain, raw, level), chunks));
            }
            let bound = builder.len();
            let (pack, object, footer) = builder.finish(&domain);
            prop_assert!(object.len() <= bound + 200, "{} {bound}", object.len());
            prop_assert_eq!(pack.object_bytes(), object.len() as u64);
            prop_assert_eq!(footer.frames.iter().map(|f| f.at).collect::<Vec<_>>(), refs);

            let (found, damaged) = check_object(&domain, pack.id, &object).unwrap();
            prop_assert_eq!(&found, &footer);
            prop_assert!(damaged.is_empty());
            let tail = &object[object.len() - pack::TRAILER_BYTES..];
            prop_assert_eq!(parse_trailer(&domain, pack.id, object.len() as u64, tail), Ok(pack));
            prop_assert_eq!(PackFooter::parse(&footer.to_raw()).unwrap(), footer.clone());
            for (frame, (kind, raw)) in footer.frames.iter().zip(&frames) {
                let range = frame.at.range();
                let stored = &object[range.start as usize..range.end as usize];
                prop_assert_eq!(frame.kind, *kind);
                prop_assert_eq!(&frame.decode(&domain, stored).unwrap(), raw);
            }
        }
    }
}

/// A guest that fills its memory with a pattern: 32 pages in some hundred bytes, but 32 chunk ids all the same.
#[test]
fn a_pack_of_pages_that_compress_to_nothing_is_full_before_its_footer_is_too_large() {
    let domain = Domain::plain();
    let raw: Vec<u8> = (1..=32).flat_map(|n| std::iter::once(n).chain([0; PAGE_BYTES - 1])).collect();
    let frame = EncodedFrame::encode(&domain, &raw, 1);
    assert!(frame.stored.len() < 1000);
    let mut builder = PackBuilder::new(&domain);
    let mut n = 0u64;
    while !builder.is_full() {
        // Ids of their own, as pages of their own would have: they do not compress.
        let chunks = noise(n, 32 * 32).chunks(32).map(|id| ChunkId(id.try_into().unwrap())).collect();
        builder.push(FrameKind::Pages, &frame, chunks);
        n += 1;
    }
    let (pack, object, footer) = builder.finish(&domain);
    assert!(object.len() < PACK_TARGET_BYTES + 8192);
    assert_eq!(check_object(&domain, pack.id, &object), Ok((footer, vec![])));
}

#[test]
fn a_pack_of_the_smallest_frames_stays_within_the_limits() {
    let domain = Domain::plain();
    let frame = EncodedFrame::encode(&domain, &[1], 1);
    let mut builder = PackBuilder::new(&domain);
    let mut n = 0;
    while !builder.is_full() && n <= PACK_FRAMES_MAX {
        builder.push(FrameKind::Blob, &frame, vec![]);
        n += 1;
    }
    assert_eq!(n, PACK_FRAMES_MAX, "frames of a byte reach the limit on their number first");
    let (pack, object, footer) = builder.finish(&domain);
    assert_eq!(check_object(&domain, pack.id, &object), Ok((footer, vec![])));
}

#[test]
fn an_empty_pack_is_a_pack() {
    for domain in domains() {
        let (pack, object, footer) = PackBuilder::new(&domain).finish(&domain);
        assert_eq!(check_object(&domain, pack.id, &object), Ok((footer, vec![])));
        assert_eq!(pack.footer_offset, 32);
    }
}

#[test]
fn a_dense_pack_says_so_at_both_ends_and_is_refused_if_they_differ() {
    for domain in domains() {
        let (pack, mut object, footer) = PackBuilder::dense(&domain).finish(&domain);
        let tail = object.len() - pack::TRAILER_BYTES;
        assert_eq!(check_object(&domain, pack.id, &object), Ok((footer, vec![])));
        assert_eq!(pack::is_dense(&object[..pack::HEADER_BYTES]), Ok(true));
        assert_eq!(pack::is_dense(&object[tail..]), Ok(true));
        object[12] &= !2;
        let why = "its header and trailer differ";
        assert_eq!(
            check_object(&domain, pack.id, &object),
            Err(FormatError::Malformed { what: "pack", why })
        );
        let (_, object, _) = PackBuilder::new(&domain).finish(&domain);
        assert_eq!(pack::is_dense(&object), Ok(false));
    }
}

#[test]
fn only_packs_may_be_dense() {
    let domain = Domain::plain();
    let mut object = reference().encode(&domain);
    object[12] |= 2;
    fix_checksum(&mut object);
    let unknown = FormatError::UnknownFlags { what: "reference", flags: 2 };
    assert_eq!(Reference::decode(&domain, None, &object), Err(unknown));
}

#[test]
fn a_pack_under_another_packs_name_is_refused() {
    let domain = Domain::plain();
    let (_, object, _) = pack(&domain);
    let (other, _, _) = PackBuilder::new(&domain).finish(&domain);
    assert_eq!(check_object(&domain, other.id, &object), Err(FormatError::HashMismatch("pack footer")));
}

#[test]
fn a_trailer_that_points_outside_its_pack_is_refused() {
    let domain = Domain::plain();
    let (pack, object, _) = pack(&domain);
    let parse = |object_bytes: u64, footer_bytes: u32| {
        let mut trailer = object[object.len() - 40..].to_vec();
        trailer[32..36].copy_from_slice(&footer_bytes.to_le_bytes());
        fix_trailer(&mut trailer);
        parse_trailer(&domain, pack.id, object_bytes, &trailer)
    };
    let size = object.len() as u64;
    assert_eq!(parse(size, pack.footer_bytes), Ok(pack));
    assert!(parse(size, (size - 72) as u32).is_ok(), "just after the header");
    for (size, footer_bytes) in [
        (size, (size - 71) as u32),
        (size, u32::MAX),
        (size, 0),
        (0, 1),
        (u64::MAX, 1),
        (PACK_BYTES_MAX + 1, 1),
        (PACK_BYTES_MAX, FOOTER_BYTES_MAX as u32 + 1),
    ] {
        assert!(parse(size, footer_bytes).is_err(), "{size} {footer_bytes}");
    }
}

#[test]
fn a_pack_whose_frames_do_not_meet_its_footer_is_refused() {
    let domain = Domain::plain();
    let (pack, object, _) = pack(&domain);
    let at = pack.footer_offset as usize;
    for gap in [&object[..at - 1], &[&object[..at], &[0]].concat()] {
        let moved = [gap, &object[at..]].concat();
        let why = "its frames do not end at its footer";
        assert_eq!(check_object(&domain, pack.id, &moved), Err(FormatError::Malformed { what: "pack", why }));
    }
}

/// A raw footer of one frame with these fields.
fn footer(kind: u8, stored: u64, raw: u64, codec: u8, ids: usize) -> Result<PackFooter, FormatError> {
    let mut w = wire::Writer::new();
    w.u8(1);
    w.varint(1);
    w.u8(kind);
    w.varint(stored);
    w.varint(raw);
    w.u8(codec);
    w.bytes(&[7; 16]);
    w.bytes(&vec![9; ids * 32]);
    PackFooter::parse(&w.finish())
}

#[test]
fn frames_that_cannot_be_are_refused() {
    assert!(footer(0, 10, 4096, 1, 1).is_ok());
    assert!(footer(1, 10, 4095, 0, 0).is_ok());
    assert!(footer(2, 10, META_FRAME_BYTES_MAX as u64, 1, 0).is_ok());
    for (kind, stored, raw, codec, ids) in [
        (3, 10, 4096, 1, 1),
        // LZ4 is for streams.
        (0, 10, 4096, 2, 1),
        (0, 10, 4096, 1, 0),
        (0, 10, 4096, 1, 2),
        (1, 10, 4096, 1, 1),
        (0, 10, 4095, 1, 0),
        (0, 10, 33 * 4096, 1, 33),
        (0, 0, 4096, 1, 1),
        (0, 10, 0, 1, 0),
        (1, 10, 0, 1, 0),
        (1, 0, 10, 0, 0),
        (1, PACK_BYTES_MAX - 31, 10, 0, 0),
        (1, u64::MAX, 10, 0, 0),
        (1, 10, META_FRAME_BYTES_MAX as u64 + 1, 1, 0),
    ] {
        assert!(footer(kind, stored, raw, codec, ids).is_err(), "{kind} {stored} {raw} {codec} {ids}");
    }
}

#[test]
fn a_footer_that_would_decompress_beyond_its_limit_is_refused() {
    let domain = Domain::plain();
    let zeros = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
    let decode = |claimed: u32| {
        let stored = [&claimed.to_le_bytes()[..], &zeros].concat();
        PackFooter::decode(&domain, PackId::of(&stored), &stored)
    };
    assert!(matches!(decode(FOOTER_BYTES_MAX as u32 + 1), Err(FormatError::OverLimit { .. })));
    assert_eq!(decode(FOOTER_BYTES_MAX as u32), Err(FormatError::Undecodable("pack footer")));
}

#[test]
fn a_frame_that_does_not_decode_to_its_size_is_refused() {
    for domain in domains() {
        for raw in [noise(1, 500), vec![3; 500]] {
            let frame = EncodedFrame::encode(&domain, &raw, 1);
            for raw_bytes in [1, 499, 501, META_FRAME_BYTES_MAX as u32] {
                let at = FrameRef { raw_bytes, ..at(&frame) };
                assert_eq!(at.decode(&domain, &frame.stored), Err(FormatError::Undecodable("frame")));
            }
            let at = FrameRef { raw_bytes: u32::MAX, ..at(&frame) };
            assert!(matches!(at.decode(&domain, &frame.stored), Err(FormatError::OverLimit { .. })));
        }
    }
}

#[test]
fn a_page_that_is_not_the_one_its_chunk_id_names_is_noticed() {
    for domain in domains() {
        let (_, object, mut footer) = pack(&domain);
        let frame = &mut footer.frames[0];
        let stored = &object[32..32 + frame.at.stored_bytes as usize];
        assert!(frame.decode(&domain, stored).is_ok());
        frame.chunks.swap(0, 1);
        assert!(matches!(frame.decode(&domain, stored), Err(FormatError::Malformed { .. })));
        frame.chunks.clear();
        assert!(matches!(frame.decode(&domain, stored), Err(FormatError::Malformed { .. })));
    }
}

#[test]
fn what_does_not_shrink_is_stored_as_it_is() {
    let domain = Domain::plain();
    let frame = EncodedFrame::encode(&domain, &noise(1, 4096), 1);
    assert_eq!((frame.codec, frame.stored.len()), (Codec::Raw, 4096));
    let frame = EncodedFrame::encode(&domain, &[5; 4096], 1);
    assert!(frame.codec == Codec::Zstd && frame.stored.len() < 100);
}
