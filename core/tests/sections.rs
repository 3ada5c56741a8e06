//! Sections against the simplest model there is: a list of pages.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_core::{
    frame::EncodedFrame,
    section::{Extent, PagePlace},
    *,
};
use proptest::prelude::*;

type Pages = Vec<Option<PagePlace>>;

/// Zero pages, or pages in sequence through as many frames as they need.
fn piece() -> impl Strategy<Value = Pages> {
    prop_oneof![
        (1usize..50).prop_map(|n| vec![None; n]),
        (0u32..14, 0usize..32, 1usize..90).prop_map(|(mut frame, slot, n)| {
            let mut slot = slot % place(frame, 0).frame.pages();
            let mut pages = vec![];
            for _ in 0..n {
                if slot == place(frame, 0).frame.pages() {
                    (frame, slot) = (frame + 1, 0);
                }
                pages.push(Some(place(frame, slot)));
                slot += 1;
            }
            pages
        }),
    ]
}

fn pages() -> impl Strategy<Value = Pages> {
    prop::collection::vec(piece(), 0..20).prop_map(|pieces| pieces.concat())
}

/// What the section says of one page, in terms of the model.
fn page_of(section: &Section, page: usize) -> Option<PagePlace> {
    match section.extent(page) {
        Extent::Zero { .. } => None,
        Extent::Frame { frame, slot, .. } => {
            let frame = section.frames()[frame as usize];
            let pack = section.packs()[frame.pack as usize];
            Some(PagePlace { pack, frame: FrameRef { pack: 0, ..frame }, slot })
        }
    }
}

fn follows(a: Option<PagePlace>, b: Option<PagePlace>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            (a.pack, a.frame, a.slot.get() + 1) == (b.pack, b.frame, b.slot.get()) && b.slot.get() < 32
        }
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_section_says_of_every_page_what_was_pushed(pages in pages()) {
        let stored = pages.iter().flatten().count() as u64;
        let section = section_of(pages.iter().copied());
        prop_assert_eq!(section.is_some(), stored > 0);
        let section = section.unwrap_or_default();
        prop_assert_eq!(section.stored_pages(), stored);
        prop_assert_eq!(section.end_page(), pages.iter().rposition(Option::is_some).map_or(0, |p| p + 1));
        let at = |page: usize| pages.get(page).copied().flatten();
        for page in (0..pages.len() + 2).chain([SECTION_PAGES as usize - 1]) {
            prop_assert_eq!(page_of(&section, page), at(page));
            // An extent is as long as it can be, and no longer.
            let (Extent::Zero { pages: n } | Extent::Frame { pages: n, .. }) = section.extent(page);
            let end = page + n as usize;
            prop_assert!(n > 0 && end <= SECTION_PAGES as usize);
            prop_assert!((page + 1..end.min(pages.len() + 1)).all(|p| follows(at(p - 1), at(p))));
            prop_assert!(end == SECTION_PAGES as usize || !follows(at(end - 1), at(end)));
        }
    }

    #[test]
    fn extents_cover_every_page_once_in_order(pages in pages()) {
        let section = section_of(pages.iter().copied()).unwrap_or_default();
        let mut next = 0;
        for (first, extent) in section.extents() {
            prop_assert_eq!(first, next);
            prop_assert_eq!(extent, section.extent(first));
            let (Extent::Zero { pages } | Extent::Frame { pages, .. }) = extent;
            for page in first..first + pages as usize {
                prop_assert_eq!(section.extent_around(page), (first, extent));
            }
            next += pages as usize;
        }
        prop_assert_eq!(next, section.end_page());
        for page in next..next + 3 {
            prop_assert_eq!(section.extent_around(page), (next, section.extent(next)));
        }
    }

    #[test]
    fn a_section_comes_back_from_its_bytes_and_has_no_other(pages in pages()) {
        if let Some(section) = section_of(pages.iter().copied()) {
            let raw = section.encode();
            let decoded = Section::decode(&raw).unwrap();
            prop_assert_eq!(&decoded, &section);
            prop_assert_eq!(decoded.encode(), raw);
        }
    }

    #[test]
    fn a_section_changed_anywhere_is_refused_or_another_section(
        pages in pages(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        if let Some(section) = section_of(pages.iter().copied()) {
            let mut raw = section.encode();
            let at = at.index(raw.len());
            raw[at] = byte;
            if let Ok(decoded) = Section::decode(&raw) {
                prop_assert_eq!(decoded.encode(), raw);
                decoded.extents().for_each(drop);
            }
        }
    }

    #[test]
    fn any_bytes_at_all_are_refused_or_read(raw in prop::collection::vec(any::<u8>(), 0..200)) {
        let versioned = [&[1], &raw[..]].concat();
        for raw in [&raw, &versioned] {
            if let Ok(section) = Section::decode(raw) {
                prop_assert_eq!(&section.encode(), raw);
            }
            if let Ok(footer) = PackFooter::parse(raw) {
                prop_assert_eq!(&footer.to_raw(), raw);
            }
            if let Ok(root) = Root::parse(raw) {
                prop_assert_eq!(&root.to_raw(), raw);
            }
        }
    }
}

#[test]
fn a_full_section_of_one_sequence_is_one_run() {
    let full = |frame: u32| PagePlace {
        pack: pack_ref(1),
        frame: frame_ref(0, 32 + frame * 20_000, 32),
        slot: Slot::new(0).unwrap(),
    };
    let page = |p: usize| PagePlace { slot: Slot::new(p % 32).unwrap(), ..full(p as u32 / 32) };
    let section = section_of((0..SECTION_PAGES as usize).map(|p| Some(page(p)))).unwrap();
    assert_eq!(section.stored_pages(), SECTION_PAGES);
    assert_eq!((section.packs().len(), section.frames().len()), (1, 512));
    // Tables of a pack and of 512 frames, then a run of three bytes and a place of one.
    let tables = 1 + 1 + 40 + 2 + 512 * frame_bytes(&section);
    assert!(section.encode().len() <= tables + 1 + 3 + 1, "{}", section.encode().len());
    assert_eq!(Section::decode(&section.encode()), Ok(section.clone()));
    assert_eq!(page_of(&section, 16_383), Some(page(16_383)));
}

fn frame_bytes(section: &Section) -> usize {
    let mut w = wire::Writer::new();
    section.frames().last().unwrap().write(&mut w);
    w.len()
}

#[test]
fn the_worst_section_fits_a_metadata_frame() {
    let page = |p: u32| PagePlace {
        pack: PackRef { id: PackId(*blake3::hash(&p.to_le_bytes()).as_bytes()), ..pack_ref(1) },
        frame: frame_ref(0, (32 + p * 700).reverse_bits() % (11 << 20) + 32, 32),
        slot: Slot::new((p as usize * 13) % 32).unwrap(),
    };
    let section = section_of((0..SECTION_PAGES as u32).map(|p| Some(page(p)))).unwrap();
    assert_eq!(section.packs().len() as u64, SECTION_PAGES);
    let raw = section.encode();
    assert!(raw.len() < limits::META_FRAME_BYTES_MAX / 2, "{}", raw.len());
    assert_eq!(Section::decode(&raw), Ok(section));
}

#[test]
fn pages_shared_with_another_section_are_found_in_their_frame() {
    let section = section();
    assert_eq!(section.extent(0), Extent::Zero { pages: 3 });
    assert_eq!(section.extent(3), Extent::Frame { frame: 0, slot: Slot::new(0).unwrap(), pages: 32 });
    assert_eq!(section.extent(34), Extent::Frame { frame: 0, slot: Slot::new(31).unwrap(), pages: 1 });
    assert_eq!(section.extent(40), Extent::Frame { frame: 1, slot: Slot::new(5).unwrap(), pages: 3 });
    assert_eq!(section.extent(43), Extent::Zero { pages: 2 });
    assert_eq!(section.extent(48), Extent::Frame { frame: 0, slot: Slot::new(7).unwrap(), pages: 1 });
    assert_eq!(section.extent(50), Extent::Zero { pages: SECTION_PAGES - 50 });
}

#[test]
#[should_panic(expected = "is not in a section")]
fn a_page_of_another_section_is_not_answered_for() {
    section().extent(SECTION_PAGES as usize);
}

/// A raw section of one pack, the given frames' page counts, and hand-written runs.
fn hand_made(frames: &[usize], runs: &[u8]) -> Result<Section, FormatError> {
    let mut w = wire::Writer::new();
    w.u8(1);
    pack::PackRef::write_table(&mut w, &[pack_ref(1)]);
    w.varint(frames.len() as u64);
    (0..).zip(frames).for_each(|(i, &pages)| frame_ref(0, 32 + i * 30_000, pages).write(&mut w));
    w.bytes(runs);
    Section::decode(&w.finish())
}

#[test]
fn runs_that_say_the_same_in_another_way_are_refused() {
    let stored = |pages: u8| pages << 1 | 1;
    let zero = |pages: u8| pages << 1;
    let refused = |runs: &[u8], why: &str| match hand_made(&[32, 32], runs) {
        Err(FormatError::Malformed { why: found, .. }) => assert_eq!(found, why),
        other => panic!("{runs:?}: {other:?}"),
    };
    assert!(hand_made(&[32, 32], &[1, stored(40), 0]).is_ok());
    assert!(hand_made(&[32, 32], &[3, stored(2), 0, zero(4), stored(3), 0]).is_ok());
    refused(&[2, stored(2), 0, stored(3), 0], "a run is split in two");
    refused(&[3, zero(1), zero(1), stored(2), 0], "a run is split in two");
    refused(&[2, stored(2), 0, zero(1)], "zero pages at its end are written out");
    refused(&[0], "zero pages at its end are written out");
    refused(&[1, stored(0), 0], "a run is empty or reaches past the section");
}

#[test]
fn places_outside_their_frames_are_refused() {
    let why = |r: Result<Section, FormatError>| match r {
        Err(FormatError::Malformed { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let run = |pages: u8, place: u8| [1, pages << 1 | 1, place << 1];
    assert!(hand_made(&[5, 32], &run(5, 0)).is_ok());
    assert_eq!(why(hand_made(&[5, 32], &run(6, 0))), "a place is not in any frame");
    assert_eq!(why(hand_made(&[5, 32], &run(1, 5))), "a place is not in any frame");
    assert_eq!(why(hand_made(&[5], &run(1, 32))), "a place is not in any frame");
    assert_eq!(why(hand_made(&[], &run(1, 0))), "a place is not in any frame");
    assert_eq!(why(hand_made(&[5], &[1, 3, 1])), "a place is out of range");
    assert_eq!(why(hand_made(&[5], &[1, 3, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F])), "a place is out of range");
}

#[test]
fn frames_outside_their_pack_are_refused() {
    for (offset, stored_bytes) in [(0, 10), (31, 10), (12 << 20, 1), ((12 << 20) - 9, 10), (u32::MAX, 1)] {
        let mut w = wire::Writer::new();
        w.u8(1);
        pack::PackRef::write_table(&mut w, &[pack_ref(1)]);
        w.varint(1);
        FrameRef { offset, stored_bytes, ..frame_ref(0, 32, 1) }.write(&mut w);
        w.bytes(&[1, 3, 0]);
        assert!(Section::decode(&w.finish()).is_err(), "{offset} {stored_bytes}");
    }
}

#[test]
fn an_image_takes_only_a_section_that_its_root_describes() {
    for domain in domains() {
        let section = section();
        let frame = EncodedFrame::encode(&domain, &section.encode(), 3);
        let entry =
            SectionEntry { content: digest(1), at: at(&frame), stored_pages: section.stored_pages() as u32 };
        let image = |pages: u64, entry| ImageEntry {
            id: ImageId::new("mem").unwrap(),
            kind: ImageKind::Memory,
            bytes: pages * PAGE_BYTES as u64,
            sections: vec![entry],
        };
        let decode =
            |image: &ImageEntry, index| image.decode_section(&domain, SectionIndex(index), &frame.stored);
        assert_eq!(decode(&image(50, Some(entry)), 0), Ok(Some(section.clone())));
        assert_eq!(decode(&image(50, Some(entry)), 1), Ok(None));
        assert_eq!(decode(&image(50, None), 0), Ok(None));
        // Pages past the image's end, or not as many as promised.
        assert!(decode(&image(49, Some(entry)), 0).is_err());
        assert!(decode(&image(50, Some(SectionEntry { stored_pages: 9, ..entry })), 0).is_err());
    }
}

#[test]
fn a_sections_content_is_hashed_as_documented() {
    let domain = Domain::plain();
    let (parent, id) = (digest(5), ChunkId(digest(6)));
    let mut content = SectionContent::new(&domain, Some(&parent));
    content.change(3, None);
    content.change(258, Some(&id));
    let bytes = [&parent[..], &[3, 0, 0, 0, 0], &[2, 1, 0, 0, 1], &id.0].concat();
    assert_eq!(content.finish(), blake3::derive_key("dormouse 2026 v1 logical content", &bytes));
    let first = blake3::derive_key("dormouse 2026 v1 logical content", &[0; 32]);
    assert_eq!(SectionContent::new(&domain, None).finish(), first);
}
