//! Objects that the tests share: small, deterministic, one of everything.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "a module of several test binaries")]

use dormouse_core::{
    frame::EncodedFrame,
    pack::{FrameKind, PackRef},
    section::PagePlace,
    *,
};

/// The key of every sealed object in the tests.
pub fn key() -> DomainKey {
    DomainKey::new(std::array::from_fn(|i| i as u8 * 7 + 1))
}

pub fn other_key() -> DomainKey {
    DomainKey::new([0xA5; 32])
}

pub fn sealed() -> Domain {
    Domain::encrypted(&key())
}

/// The domain without a key, and one with.
pub fn domains() -> [Domain; 2] {
    [Domain::plain(), sealed()]
}

pub fn name_of(domain: &Domain) -> &'static str {
    if domain.is_encrypted() { "sealed" } else { "plain" }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

pub fn digest(seed: u64) -> Digest {
    std::array::from_fn(|i| (seed as u8).wrapping_mul(31).wrapping_add(i as u8))
}

/// A pack reference that no pack stands behind.
pub fn pack_ref(seed: u64) -> PackRef {
    PackRef { id: PackId(digest(seed)), footer_offset: 12 << 20, footer_bytes: 70_000 + seed as u32 }
}

/// A reference to a frame of `pages` pages that nothing stands behind.
pub fn frame_ref(pack: u32, offset: u32, pages: usize) -> FrameRef {
    let mut hash = [0; 16];
    hash.copy_from_slice(&noise(u64::from(offset), 16));
    FrameRef {
        pack,
        offset,
        stored_bytes: 900 * pages as u32,
        raw_bytes: (pages * PAGE_BYTES) as u32,
        codec: Codec::Zstd,
        hash: FrameHash(hash),
    }
}

/// A place in a frame whose offset, size and pack follow from its number.
pub fn place(frame: u32, slot: usize) -> PagePlace {
    let pages = [32, 32, 5, 1, 32][frame as usize % 5];
    PagePlace {
        pack: pack_ref(u64::from(frame) / 3),
        frame: frame_ref(0, 32 + frame * 30_000, pages),
        slot: Slot::new(slot % pages).unwrap(),
    }
}

pub fn section_of(pages: impl IntoIterator<Item = Option<PagePlace>>) -> Option<Section> {
    let mut builder = SectionBuilder::new();
    pages.into_iter().for_each(|p| builder.push(p));
    builder.finish()
}

/// Zero pages at the start and in the middle, a run over two frames, a jump back.
pub fn section() -> Section {
    let mut pages = vec![None; 3];
    pages.extend((0..32).map(|s| Some(place(0, s))));
    pages.extend((0..8).map(|s| Some(place(1, s))));
    pages.extend([None, None]);
    pages.extend((1..4).map(|s| Some(place(2, s))));
    pages.extend([Some(place(0, 7)), Some(place(3, 0))]);
    section_of(pages).unwrap()
}

/// Two images, one of them sparse, one with a short last section; blobs of two pieces and of none.
pub fn root() -> Root {
    let entry = |n: u64| {
        Some(SectionEntry {
            content: digest(40 + n),
            at: FrameRef { raw_bytes: 1234, ..frame_ref(n as u32 % 2, 32 + n as u32 * 50_000, 1) },
            stored_pages: 3 + n as u32,
        })
    };
    let piece = |n: u32, raw_bytes| FrameRef { raw_bytes, ..frame_ref(0, 5_000_000 + n * 9_000, 1) };
    let section = SECTION_PAGES * PAGE_BYTES as u64;
    Root {
        parent: Some(SnapshotId(digest(90))),
        created_unix_ms: 1_790_000_000_123,
        labels: vec![("app".into(), "web".into()), ("zürich".into(), String::new())],
        images: vec![
            ImageEntry {
                id: ImageId::new("mem").unwrap(),
                kind: ImageKind::Memory,
                bytes: 7 * section,
                sections: vec![None, entry(0), entry(1), None, None, entry(2), None],
            },
            ImageEntry {
                id: ImageId::new("vda").unwrap(),
                kind: ImageKind::Disk,
                bytes: section + 20_001,
                sections: vec![entry(3), Some(SectionEntry { stored_pages: 5, ..entry(4).unwrap() })],
            },
        ],
        blobs: vec![
            BlobEntry {
                id: ImageId::new("vmstate").unwrap(),
                content: digest(70),
                bytes: 1_048_576 + 17,
                pieces: vec![piece(0, 1_048_576), piece(1, 17)],
            },
            BlobEntry { id: ImageId::new("empty").unwrap(), content: digest(71), bytes: 0, pieces: vec![] },
        ],
        packs: vec![pack_ref(1), pack_ref(2)],
    }
}

pub fn reference() -> Reference {
    Reference {
        name: Name::new("web-1.prod").unwrap(),
        sequence: 41,
        snapshot: SnapshotId(digest(80)),
        root: RootId(digest(81)),
        root_bytes: 5_321,
        written_unix_ms: 1_790_000_000_456,
        expires_unix_ms: 0,
        newer: None,
    }
}

/// What is at the key of a name in the versions that know nonces: of three kinds.
pub fn named(domain: &Domain) -> [(&'static str, Named); 3] {
    let tombstone = Tombstone { name_key: domain.name_key(reference().name.as_str()), sequence: 42 };
    let newer = NewerGuest { host: "host-7".to_owned(), since_unix_ms: 1_790_000_000_999 };
    let older = Reference { newer: Some(newer), ..reference() };
    [
        ("reference", Named::Reference(reference())),
        ("tombstone", Named::Removed(tombstone)),
        ("older", Named::Reference(older)),
    ]
}

pub fn identity() -> Identity {
    Identity { id: NONCE, created_unix_ms: 1_790_000_000_789 }
}

/// A nonce that is always the same.
pub const NONCE: Nonce = *b"never used twice";

/// A frame that is stored as it is, so that its bytes do not depend on the version of zstd.
pub fn raw_frame(domain: &Domain, seed: u64, bytes: usize) -> (Vec<u8>, EncodedFrame) {
    let raw = noise(seed, bytes);
    let frame = EncodedFrame::encode(domain, &raw, 1);
    assert_eq!(frame.codec, Codec::Raw);
    (raw, frame)
}

/// A pack of one frame of each kind, all stored raw.
pub fn pack(domain: &Domain) -> (PackRef, Vec<u8>, PackFooter) {
    let mut builder = PackBuilder::new(domain);
    let (raw, frame) = raw_frame(domain, 1, 2 * PAGE_BYTES);
    let chunks = raw.chunks(PAGE_BYTES).map(|p| domain.chunk_id(p)).collect();
    builder.push(FrameKind::Pages, &frame, chunks);
    builder.push(FrameKind::Section, &raw_frame(domain, 2, 300).1, vec![]);
    builder.push(FrameKind::Blob, &raw_frame(domain, 3, 77).1, vec![]);
    let (raw, frame) = raw_frame(domain, 4, PAGE_BYTES);
    builder.push(FrameKind::Pages, &frame, vec![domain.chunk_id(&raw)]);
    builder.finish(domain)
}

/// The reference of an encoded frame, as if it were the first of a pack.
pub fn at(frame: &EncodedFrame) -> FrameRef {
    FrameRef {
        pack: 0,
        offset: 32,
        stored_bytes: frame.stored.len() as u32,
        raw_bytes: frame.raw_bytes,
        codec: frame.codec,
        hash: frame.hash,
    }
}

/// Makes the checksum of an envelope right again after its header was changed.
pub fn fix_checksum(object: &mut [u8]) {
    let at = object.len() - 32;
    let checksum = blake3::hash(&object[..at]);
    object[at..].copy_from_slice(checksum.as_bytes());
}

/// The same for a pack's trailer.
pub fn fix_trailer(trailer: &mut [u8]) {
    let at = trailer.len() - 4;
    let checksum = blake3::hash(&trailer[..at]);
    trailer[at..].copy_from_slice(&checksum.as_bytes()[..4]);
}

/// Calls `f` with every copy of `bytes` in which one bit is the other way round.
pub fn every_flip(bytes: &[u8], mut f: impl FnMut(usize, &[u8])) {
    let mut copy = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        copy[bit / 8] ^= 1 << (bit % 8);
        f(bit, &copy);
        copy[bit / 8] ^= 1 << (bit % 8);
    }
}

/// Calls `f` with every proper prefix of `bytes`, and with it lengthened by one byte.
pub fn every_cut(bytes: &[u8], mut f: impl FnMut(usize, &[u8])) {
    (0..bytes.len()).for_each(|n| f(n, &bytes[..n]));
    for extra in [0, 1, 0xFF] {
        let longer = [bytes, &[extra]].concat();
        f(longer.len(), &longer);
    }
}
