//! Roots and references: round trips, identity, and what a root must not claim.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_core::{limits::*, *};
use proptest::prelude::*;

fn id() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,12}"
}

fn frame(packs: u32) -> impl Strategy<Value = FrameRef> {
    (0..packs, 32u32..12_000_000, 1u32..100_000, 1u32..4_000_000, any::<bool>(), any::<[u8; 16]>()).prop_map(
        |(pack, offset, stored_bytes, raw_bytes, zstd, hash)| {
            let codec = if zstd { Codec::Zstd } else { Codec::Raw };
            FrameRef { pack, offset, stored_bytes, raw_bytes, codec, hash: FrameHash(hash) }
        },
    )
}

fn image(packs: u32) -> impl Strategy<Value = ImageEntry> {
    let section = prop::option::weighted(
        0.4,
        (any::<[u8; 32]>(), frame(packs), 1u32..=16_384)
            .prop_map(|(content, at, stored_pages)| SectionEntry { content, at, stored_pages }),
    );
    let short = 1..=SECTION_PAGES * PAGE_BYTES as u64;
    (id(), any::<bool>(), prop::collection::vec(section, 0..30), short).prop_map(
        |(id, disk, mut sections, last)| {
            let bytes = (sections.len() as u64).saturating_sub(1) * SECTION_PAGES * PAGE_BYTES as u64;
            let bytes = if sections.is_empty() { 0 } else { bytes + last };
            if let Some(Some(section)) = sections.last_mut() {
                section.stored_pages = section.stored_pages.min(PageCount::covering(last).0 as u32);
            }
            let kind = if disk { ImageKind::Disk } else { ImageKind::Memory };
            ImageEntry { id: ImageId::new(id).unwrap(), kind, bytes, sections }
        },
    )
}

fn any_root() -> impl Strategy<Value = Root> {
    (1u32..5).prop_flat_map(|packs| {
        let blob = (id(), any::<[u8; 32]>(), prop::collection::vec(frame(packs), 0..4)).prop_map(
            |(id, content, pieces)| BlobEntry {
                id: ImageId::new(id).unwrap(),
                content,
                bytes: pieces.iter().map(|p| u64::from(p.raw_bytes)).sum(),
                pieces,
            },
        );
        (
            prop::option::of(any::<[u8; 32]>()),
            any::<u64>(),
            prop::collection::btree_map(".{0,8}", ".{0,20}", 0..4),
            prop::collection::vec(image(packs), 0..4),
            prop::collection::vec(blob, 0..3),
        )
            .prop_map(move |(parent, created_unix_ms, labels, mut images, mut blobs)| {
                images.sort_by(|a, b| a.id.cmp(&b.id));
                images.dedup_by(|a, b| a.id == b.id);
                blobs.sort_by(|a, b| a.id.cmp(&b.id));
                blobs.dedup_by(|a, b| a.id == b.id);
                Root {
                    parent: parent.map(SnapshotId),
                    created_unix_ms,
                    labels: labels.into_iter().collect(),
                    images,
                    blobs,
                    packs: (0..u64::from(packs)).map(pack_ref).collect(),
                }
            })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_root_comes_back(root in any_root()) {
        prop_assert_eq!(root.check(), Ok(()));
        let raw = root.to_raw();
        let parsed = Root::parse(&raw);
        prop_assert_eq!(parsed.as_ref(), Ok(&root));
        for domain in domains() {
            let (id, object) = root.encode(&domain);
            prop_assert_eq!(id, RootId::of(&object));
            let decoded = Root::decode(&domain, id, &object).unwrap();
            prop_assert_eq!(decoded.snapshot_id(&domain), root.snapshot_id(&domain));
            prop_assert_eq!(&decoded, &root);
        }
    }

    #[test]
    fn a_reference_comes_back(
        name in id(), sequence: u64, ids: ([u8; 32], [u8; 32]), root_bytes: u32, times: (u64, u64),
    ) {
        let reference = Reference {
            name: Name::new(name).unwrap(),
            sequence,
            snapshot: SnapshotId(ids.0),
            root: RootId(ids.1),
            root_bytes,
            written_unix_ms: times.0,
            expires_unix_ms: times.1,
            newer: None,
        };
        for domain in domains() {
            let object = reference.encode(&domain);
            prop_assert!(object.len() <= REFERENCE_BYTES_MAX);
            prop_assert_eq!(Reference::decode(&domain, Some(&reference.name), &object).unwrap(), reference.clone());
        }
    }
}

#[test]
fn a_snapshots_identity_covers_what_it_is_and_not_where_it_lies() {
    let domain = Domain::plain();
    let id = |f: &dyn Fn(&mut Root)| {
        let mut root = root();
        f(&mut root);
        assert_eq!(root.check(), Ok(()));
        root.snapshot_id(&domain)
    };
    let own = id(&|_| ());
    let same: [&dyn Fn(&mut Root); 4] = [
        &|r| r.created_unix_ms = 0,
        &|r| r.packs.push(pack_ref(9)),
        &|r| r.images[0].sections[1].as_mut().unwrap().at = frame_ref(1, 777, 1),
        &|r| r.blobs[0].pieces = vec![FrameRef { raw_bytes: 1_048_593, ..frame_ref(0, 99, 1) }],
    ];
    same.iter().for_each(|f| assert_eq!(id(f), own));
    let other: [&dyn Fn(&mut Root); 9] = [
        &|r| r.parent = None,
        &|r| r.labels[0].1 = "db".into(),
        &|r| r.images[0].bytes -= 1,
        &|r| r.images[0].kind = ImageKind::Disk,
        &|r| r.images[0].id = ImageId::new("memory").unwrap(),
        &|r| r.images[0].sections[1].as_mut().unwrap().content[31] ^= 1,
        &|r| r.images[0].sections.swap(2, 3),
        &|r| r.blobs[0].content[0] ^= 1,
        &|r| r.images.swap(0, 1),
    ];
    let mut ids: Vec<_> = other.iter().map(|f| id(f)).collect();
    ids.push(own);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), other.len() + 1);
}

#[test]
fn a_blob_cannot_take_a_snapshots_identity() {
    for domain in domains() {
        let raw = root().to_raw();
        let mut r = wire::Reader::new(&raw, "root");
        let logical = r.counted("logical part", usize::MAX).unwrap();
        assert_ne!(blob_content(&domain, logical), root().snapshot_id(&domain).0);
    }
}

type Change = Box<dyn Fn(&mut Root)>;

#[test]
fn a_root_that_no_reader_would_accept_fails_its_check() {
    let long = "x".repeat(LABEL_BYTES_MAX + 1);
    let image =
        |n: usize| ImageEntry { id: ImageId::new(format!("i{n}")).unwrap(), ..root().images[0].clone() };
    let blob = |n: usize| BlobEntry { id: ImageId::new(format!("b{n}")).unwrap(), ..root().blobs[1].clone() };
    let cases: Vec<(&str, Change)> = vec![
        ("labels out of order", Box::new(|r| r.labels.swap(0, 1))),
        ("a label twice", Box::new(|r| r.labels[1].0 = "app".into())),
        ("a label too long", Box::new(move |r| r.labels[1].1 = long.clone())),
        (
            "too many labels",
            Box::new(|r| r.labels = (0..=LABELS_MAX).map(|i| (format!("{i:03}"), String::new())).collect()),
        ),
        ("an image twice", Box::new(|r| r.images[1].id = r.images[0].id.clone())),
        ("too many images", Box::new(move |r| r.images = (0..=IMAGES_MAX).map(image).collect())),
        ("an image too large", Box::new(|r| r.images[0].bytes = u64::MAX)),
        ("a section missing", Box::new(|r| r.images[0].sections.truncate(6))),
        ("a section too many", Box::new(|r| r.images[0].sections.push(None))),
        ("no page in a section", Box::new(|r| r.images[1].sections[1].as_mut().unwrap().stored_pages = 0)),
        ("pages past the end", Box::new(|r| r.images[1].sections[1].as_mut().unwrap().stored_pages = 6)),
        ("a blob twice", Box::new(|r| r.blobs[1].id = r.blobs[0].id.clone())),
        ("too many blobs", Box::new(move |r| r.blobs = (0..=BLOBS_MAX).map(blob).collect())),
        ("a blob too large", Box::new(|r| r.blobs[0].bytes = BLOB_BYTES_MAX + 1)),
        ("a blob's piece missing", Box::new(|r| r.blobs[0].pieces.truncate(1))),
        ("a pack twice", Box::new(|r| r.packs[1].id = r.packs[0].id)),
        ("a pack too large", Box::new(|r| r.packs[1].footer_offset = PACK_BYTES_MAX as u32)),
        ("a pack without a footer", Box::new(|r| r.packs[1].footer_bytes = 0)),
        ("a pack without a header", Box::new(|r| r.packs[1].footer_offset = 31)),
        ("a pack missing", Box::new(|r| r.packs.truncate(1))),
        ("no packs", Box::new(|r| r.packs.clear())),
        ("a piece in the header", Box::new(|r| r.blobs[0].pieces[0].offset = 31)),
        ("a piece in the footer", Box::new(|r| r.blobs[0].pieces[0].offset = 12 << 20)),
    ];
    for (what, change) in cases {
        let mut root = root();
        assert_eq!(root.check(), Ok(()));
        change(&mut root);
        assert!(root.check().is_err(), "check: {what}");
        assert!(Root::parse(&root.to_raw()).is_err(), "parse: {what}");
    }
}

/// A root's raw bytes with the given image table and nothing else.
fn of_images(count: u64, image: impl Fn(&mut wire::Writer, u64)) -> Vec<u8> {
    let mut logical = wire::Writer::new();
    logical.u8(0);
    logical.varint(0);
    logical.varint(count);
    (0..count).for_each(|n| image(&mut logical, n));
    logical.varint(0);
    let mut w = wire::Writer::new();
    w.counted(&logical.finish());
    w.u64(0);
    w.varint(0);
    w.finish()
}

#[test]
fn absent_sections_do_not_make_a_small_root_a_large_table() {
    let largest = IMAGE_PAGES_MAX / SECTION_PAGES;
    let images = |count| {
        of_images(count, |w, n| {
            w.counted(format!("i{n}").as_bytes());
            w.u8(0);
            w.varint(IMAGE_PAGES_MAX * PAGE_BYTES as u64);
            w.varint(largest);
            w.varint(0);
        })
    };
    let most = SECTIONS_MAX as u64 / largest;
    assert_eq!(Root::parse(&images(most)).unwrap().images.len() as u64, most);
    let raw = images(IMAGES_MAX as u64);
    assert!(raw.len() < 8192);
    let value = SECTIONS_MAX as u64 + largest;
    let limit = SECTIONS_MAX as u64;
    assert_eq!(Root::parse(&raw), Err(FormatError::OverLimit { what: "sections", value, limit }));
}

#[test]
fn absent_sections_are_written_in_one_way_only() {
    let image = |runs: &'static [u64]| {
        of_images(1, |w, _| {
            w.counted(b"mem");
            w.u8(0);
            w.varint(4 * SECTION_PAGES * PAGE_BYTES as u64);
            runs.iter().for_each(|&n| w.varint(n));
        })
    };
    assert!(Root::parse(&image(&[4, 0])).is_ok());
    let split = FormatError::Malformed { what: "root", why: "a run of sections is split in two" };
    assert_eq!(Root::parse(&image(&[2, 0, 2, 0])), Err(split.clone()));
    assert_eq!(Root::parse(&image(&[0, 0, 4, 0])), Err(split));
    assert!(matches!(Root::parse(&image(&[5, 0])), Err(FormatError::OverLimit { .. })));
}

#[test]
fn a_body_larger_than_it_says_or_than_allowed_is_not_decompressed() {
    let body_kind = envelope::Kind { magic: *b"DORMROOT", what: "root", body_bytes_max: ROOT_BYTES_MAX };
    let domain = Domain::plain();
    let zeros = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
    let decode = |claimed: u32| {
        let body = [&claimed.to_le_bytes()[..], &zeros].concat();
        let object = envelope::wrap(body_kind, &domain, body);
        Root::decode(&domain, RootId::of(&object), &object)
    };
    let undecodable = Err(FormatError::Undecodable("root"));
    assert_eq!(decode((1 << 20) - 1), undecodable);
    assert_eq!(decode((1 << 20) + 1), undecodable);
    assert!(matches!(decode(u32::MAX), Err(FormatError::OverLimit { what: "root", .. })));
}

#[test]
fn an_envelope_over_its_limit_is_refused_by_its_header_alone() {
    let domain = Domain::plain();
    let mut object = reference().encode(&domain);
    object[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
    let limit = REFERENCE_BYTES_MAX as u64;
    let value = u64::from(u32::MAX);
    let refused = Reference::decode(&domain, None, &object[..40]);
    assert_eq!(refused, Err(FormatError::OverLimit { what: "reference", value, limit }));
}

#[test]
fn a_64_gib_machine_has_a_root_of_under_100_kib() {
    let sections = (0..1024)
        .map(|n| {
            let content = noise(n, 32).try_into().unwrap();
            let at = FrameRef { raw_bytes: 20_000, ..frame_ref(n as u32 % 40, 32 + n as u32 * 9_000, 1) };
            Some(SectionEntry { content, at, stored_pages: 16_000 })
        })
        .collect();
    let image =
        ImageEntry { id: ImageId::new("mem").unwrap(), kind: ImageKind::Memory, bytes: 64 << 30, sections };
    let root = Root { images: vec![image], packs: (0..40).map(pack_ref).collect(), ..Root::default() };
    let (id, object) = root.encode(&sealed());
    assert!(object.len() < 100 << 10, "{}", object.len());
    assert_eq!(Root::decode(&sealed(), id, &object), Ok(root));
}
