//! Every bit of every kind of object turned, and every object cut anywhere: an error, never a wrong value.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_core::{
    pack::{check_object, parse_trailer},
    *,
};

/// A pack is intact if it decodes and none of its frames is damaged.
fn pack_is_intact(domain: &Domain, id: PackId, object: &[u8]) -> bool {
    check_object(domain, id, object).is_ok_and(|(_, damaged)| damaged.is_empty())
}

#[test]
fn a_damaged_reference_is_refused() {
    for domain in domains() {
        let object = reference().encode(&domain);
        assert!(Reference::decode(&domain, None, &object).is_ok());
        let refused = |at: usize, b: &[u8]| {
            assert!(Reference::decode(&domain, None, b).is_err(), "{} at {at}", name_of(&domain));
        };
        every_flip(&object, refused);
        every_cut(&object, refused);
    }
}

#[test]
fn a_damaged_reference_with_nonce_or_tombstone_is_refused() {
    for (domain, (what, named)) in domains().iter().flat_map(|d| named(d).map(|n| (d, n))) {
        let object = named.encode(domain, &NONCE);
        assert_eq!(Named::decode(domain, Some(&reference().name), &object), Ok(named));
        let refused = |at: usize, b: &[u8]| {
            assert!(Named::decode(domain, None, b).is_err(), "{what} {} at {at}", name_of(domain));
        };
        every_flip(&object, refused);
        every_cut(&object, refused);
    }
}

#[test]
fn a_damaged_identity_is_refused() {
    for domain in domains() {
        let object = identity().encode(&domain);
        assert_eq!(Identity::decode(&domain, &object), Ok(identity()));
        let refused = |at: usize, b: &[u8]| {
            assert!(Identity::decode(&domain, b).is_err(), "{} at {at}", name_of(&domain));
        };
        every_flip(&object, refused);
        every_cut(&object, refused);
    }
}

#[test]
fn a_damaged_root_is_refused_by_its_name_and_by_its_checksum() {
    for domain in domains() {
        let (id, object) = root().encode(&domain);
        assert!(Root::decode(&domain, id, &object).is_ok());
        let refused = |at: usize, b: &[u8]| {
            assert!(Root::decode(&domain, id, b).is_err(), "{} at {at}", name_of(&domain));
            assert!(
                Root::decode(&domain, RootId::of(b), b).is_err(),
                "{} at {at}, renamed",
                name_of(&domain)
            );
        };
        every_flip(&object, refused);
        every_cut(&object, refused);
    }
}

#[test]
fn a_damaged_pack_is_noticed_in_every_byte() {
    for domain in domains() {
        let (pack, object, _) = pack(&domain);
        assert!(pack_is_intact(&domain, pack.id, &object));
        let refused = |at: usize, b: &[u8]| {
            assert!(!pack_is_intact(&domain, pack.id, b), "{} at {at}", name_of(&domain));
        };
        // All of what is not frames; of the frames, whose hashes take long, every hundredth bit.
        every_flip(&object[..pack.footer_offset as usize], |bit, head| {
            if bit < 32 * 8 || bit % 101 == 0 {
                refused(bit, &[head, &object[pack.footer_offset as usize..]].concat());
            }
        });
        every_flip(&object[pack.footer_offset as usize..], |bit, tail| {
            refused(bit, &[&object[..pack.footer_offset as usize], tail].concat());
        });
        every_cut(&object, refused);
    }
}

#[test]
fn a_damaged_frame_is_named_by_its_index_and_the_others_stay_readable() {
    for domain in domains() {
        let (pack, mut object, footer) = pack(&domain);
        object[footer.frames[1].at.offset as usize] ^= 1;
        let (found, damaged) = check_object(&domain, pack.id, &object).unwrap();
        assert_eq!((found, damaged), (footer, vec![1]));
    }
}

#[test]
fn a_damaged_footer_is_refused() {
    for domain in domains() {
        let (pack, object, footer) = pack(&domain);
        let range = pack.footer_range();
        let stored = &object[range.start as usize..range.end as usize];
        assert_eq!(PackFooter::decode(&domain, pack.id, stored), Ok(footer));
        let refused = |_: usize, b: &[u8]| {
            assert_eq!(
                PackFooter::decode(&domain, pack.id, b),
                Err(FormatError::HashMismatch("pack footer"))
            );
        };
        every_flip(stored, refused);
        every_cut(stored, refused);
    }
}

#[test]
fn a_damaged_trailer_is_refused_alone() {
    for domain in domains() {
        let (pack, object, _) = pack(&domain);
        let (size, trailer) = (object.len() as u64, &object[object.len() - 40..]);
        assert_eq!(parse_trailer(&domain, pack.id, size, trailer), Ok(pack));
        let refused = |at: usize, b: &[u8]| {
            assert!(parse_trailer(&domain, pack.id, size, b).is_err(), "{} at {at}", name_of(&domain));
        };
        every_flip(trailer, refused);
        every_cut(trailer, refused);
    }
}

#[test]
fn a_damaged_frame_is_refused_before_it_is_decoded() {
    for domain in domains() {
        for raw in [noise(9, 300), vec![7; 5000]] {
            let frame = frame::EncodedFrame::encode(&domain, &raw, 3);
            let at = at(&frame);
            assert_eq!(at.decode(&domain, &frame.stored), Ok(raw));
            every_flip(&frame.stored, |_, b| {
                assert_eq!(at.decode(&domain, b), Err(FormatError::HashMismatch("frame")));
            });
            every_cut(&frame.stored, |_, b| {
                assert_eq!(at.decode(&domain, b), Err(FormatError::Truncated("frame")));
            });
        }
    }
}

/// Sealing stands on its own: where the hash is made right again, the key still tells.
#[test]
fn a_sealed_frame_changed_by_someone_without_the_key_is_refused() {
    let domain = sealed();
    let (_, frame) = raw_frame(&domain, 5, 200);
    every_flip(&frame.stored, |_, b| {
        let at = FrameRef { hash: FrameHash::of(b), ..at(&frame) };
        assert_eq!(at.decode(&domain, b), Err(FormatError::WrongKey("frame")));
    });
}

#[test]
fn a_sealed_reference_whose_header_was_changed_by_someone_without_the_key_is_refused() {
    let domain = sealed();
    let mut object = reference().encode(&domain);
    object[8] = 9; // written by version 9: harmless in itself, but not what was sealed
    fix_checksum(&mut object);
    let refused = Reference::decode(&domain, None, &object);
    assert_eq!(refused, Err(FormatError::WrongKey("reference")));
}

/// Without a hash over them raw bytes can turn into other valid ones, but never into the same value twice.
fn one_encoding<T: PartialEq + std::fmt::Debug>(
    raw: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    encode: impl Fn(&T) -> Vec<u8>,
) {
    assert_eq!(encode(&decode(raw).unwrap()), raw);
    let mut refused = 0;
    every_flip(raw, |bit, b| match decode(b) {
        Ok(value) => assert_eq!(encode(&value), b, "bit {bit}"),
        Err(_) => refused += 1,
    });
    assert!(refused > 0);
    every_cut(raw, |at, b| assert!(decode(b).is_err(), "cut at {at}"));
}

#[test]
fn raw_sections_have_one_encoding() {
    one_encoding(&section().encode(), Section::decode, Section::encode);
}

#[test]
fn raw_roots_have_one_encoding() {
    one_encoding(&root().to_raw(), Root::parse, Root::to_raw);
}

#[test]
fn raw_footers_have_one_encoding() {
    let (_, _, footer) = pack(&Domain::plain());
    one_encoding(&footer.to_raw(), PackFooter::parse, PackFooter::to_raw);
}
