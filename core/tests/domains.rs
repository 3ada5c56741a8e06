//! Keys, versions and flags: each mismatch has an error of its own.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_core::{
    envelope::FORMAT_VERSION,
    pack::{check_object, parse_trailer},
    *,
};

type Opener = Box<dyn Fn(&Domain, &[u8]) -> Result<(), FormatError>>;
type Fixer = fn(&mut Vec<u8>);

/// Every object that begins with magic, versions, flags and domain: its bytes, how to make its own checksum right
/// after a change, how to open it.
fn objects(domain: &Domain) -> Vec<(&'static str, Vec<u8>, Fixer, Opener)> {
    let (id, root_object) = root().encode(domain);
    let _ = id;
    let (pack, pack_object, _) = pack(domain);
    let size = pack_object.len();
    let trailer = pack_object[size - 40..].to_vec();
    let fix_pack: Fixer = |b| {
        // Header and trailer say the same.
        let at = b.len() - 40;
        let start: Vec<u8> = b[8..32].to_vec();
        b[at + 8..at + 32].copy_from_slice(&start);
        fix_trailer(&mut b[at..]);
    };
    vec![
        (
            "reference",
            reference().encode(domain),
            |b| fix_checksum(b),
            Box::new(|d, b| Reference::decode(d, None, b).map(|_| ())),
        ),
        (
            "root",
            root_object,
            |b| fix_checksum(b),
            Box::new(|d, b| Root::decode(d, RootId::of(b), b).map(|_| ())),
        ),
        ("pack", pack_object, fix_pack, Box::new(move |d, b| check_object(d, pack.id, b).map(|_| ()))),
        (
            "pack",
            trailer,
            |b| fix_trailer(b),
            Box::new(move |d, b| parse_trailer(d, pack.id, size as u64, b).map(|_| ())),
        ),
    ]
}

#[test]
fn an_object_of_another_key_says_so() {
    let (own, other) = (sealed(), Domain::encrypted(&other_key()));
    for (what, object, _, open) in objects(&own) {
        assert_eq!(open(&own, &object), Ok(()));
        assert_eq!(open(&other, &object), Err(FormatError::WrongKey(what)));
    }
}

#[test]
fn a_sealed_object_without_a_key_asks_for_one() {
    for (what, object, _, open) in objects(&sealed()) {
        assert_eq!(open(&Domain::plain(), &object), Err(FormatError::KeyMissing(what)));
    }
}

#[test]
fn a_plain_object_is_not_taken_for_one_of_an_encrypted_domain() {
    for (what, object, _, open) in objects(&Domain::plain()) {
        assert_eq!(open(&sealed(), &object), Err(FormatError::WrongKey(what)));
    }
}

#[test]
fn a_plain_object_relabelled_with_an_encrypted_domain_is_refused() {
    for (_, mut object, fix, open) in objects(&Domain::plain()) {
        object[12] = 1;
        object[16..32].copy_from_slice(&sealed().id().0);
        fix(&mut object);
        // The pack's trailer alone has nothing sealed in it, and says no more than where to look.
        if object.len() != 40 {
            assert!(matches!(
                open(&sealed(), &object),
                Err(FormatError::WrongKey(_) | FormatError::Truncated(_))
            ));
        }
    }
}

#[test]
fn an_object_for_a_newer_reader_says_which() {
    for domain in domains() {
        for (what, mut object, fix, open) in objects(&domain) {
            object[8..12].copy_from_slice(&[9, 0, 8, 0]);
            fix(&mut object);
            let reads = FORMAT_VERSION;
            assert_eq!(open(&domain, &object), Err(FormatError::TooNew { what, needs: 8, reads }));
        }
    }
}

#[test]
fn an_object_of_a_newer_writer_that_this_reader_may_read_is_read() {
    let domain = Domain::plain();
    for (_, mut object, fix, open) in objects(&domain) {
        object[8] = 9;
        fix(&mut object);
        assert_eq!(open(&domain, &object), Ok(()));
    }
}

#[test]
fn versions_that_contradict_each_other_are_refused() {
    for domain in domains() {
        for versions in [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]] {
            for (what, mut object, fix, open) in objects(&domain) {
                object[8..12].copy_from_slice(&versions);
                fix(&mut object);
                let why = "its versions contradict each other";
                assert_eq!(open(&domain, &object), Err(FormatError::Malformed { what, why }));
            }
        }
    }
}

#[test]
fn an_unknown_flag_is_named() {
    for domain in domains() {
        for (what, mut object, fix, open) in objects(&domain) {
            object[15] |= 0x40;
            fix(&mut object);
            let flags = 0x4000_0000;
            assert_eq!(open(&domain, &object), Err(FormatError::UnknownFlags { what, flags }));
        }
    }
}

#[test]
fn a_raw_footer_or_section_of_another_version_is_refused_by_name() {
    let mut footer = pack(&Domain::plain()).2.to_raw();
    let mut section = section().encode();
    (footer[0], section[0]) = (2, 2);
    let too_new = |what| FormatError::TooNew { what, needs: 2, reads: 1 };
    assert_eq!(PackFooter::parse(&footer), Err(too_new("pack footer")));
    assert_eq!(Section::decode(&section), Err(too_new("page-map section")));
    (footer[0], section[0]) = (0, 0);
    assert!(matches!(PackFooter::parse(&footer), Err(FormatError::Malformed { .. })));
    assert!(matches!(Section::decode(&section), Err(FormatError::Malformed { .. })));
}

#[test]
fn one_kind_of_object_is_not_taken_for_another() {
    let domain = Domain::plain();
    let object = reference().encode(&domain);
    assert_eq!(Root::decode(&domain, RootId::of(&object), &object), Err(FormatError::NotThisKind("root")));
    let (_, object) = root().encode(&domain);
    assert_eq!(Reference::decode(&domain, None, &object), Err(FormatError::NotThisKind("reference")));
    let (pack, object, _) = pack(&domain);
    let header_for_trailer = parse_trailer(&domain, pack.id, object.len() as u64, &object[..40]);
    assert_eq!(header_for_trailer, Err(FormatError::NotThisKind("pack")));
}

#[test]
fn a_reference_put_under_another_name_is_noticed() {
    for domain in domains() {
        let object = reference().encode(&domain);
        let own = reference().name;
        assert_eq!(Reference::decode(&domain, Some(&own), &object), Ok(reference()));
        let other = Name::new("web-2.prod").unwrap();
        assert!(matches!(
            Reference::decode(&domain, Some(&other), &object),
            Err(FormatError::Malformed { why: "it is the reference of another name", .. })
        ));
    }
}

#[test]
fn what_was_sealed_as_one_thing_does_not_open_as_another() {
    let domain = sealed();
    let object = domain.seal("frame", vec![1; 100]);
    assert_eq!(domain.open("frame", &object).unwrap(), vec![1; 100]);
    assert_eq!(domain.open("pack footer", &object), Err(FormatError::WrongKey("pack footer")));
}

#[test]
fn sealing_twice_gives_the_same_bytes_and_other_bytes_another_nonce() {
    let domain = sealed();
    let seal = |byte| domain.seal("frame", vec![byte; 100]);
    assert_eq!(seal(1), seal(1));
    assert_ne!(seal(1)[..24], seal(2)[..24]);
    assert_ne!(seal(1)[..24], domain.seal("root", vec![1; 100])[..24]);
    assert_ne!(seal(1), Domain::encrypted(&other_key()).seal("frame", vec![1; 100]));
}

#[test]
fn domains_share_no_identity_of_equal_content() {
    let all = [Domain::plain(), sealed(), Domain::encrypted(&other_key())];
    let ids = |f: &dyn Fn(&Domain) -> Digest| {
        let mut ids: Vec<_> = all.iter().map(f).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.len()
    };
    assert_eq!(ids(&|d| d.chunk_id(&[7; PAGE_BYTES]).0), 3);
    assert_eq!(ids(&|d| root().snapshot_id(d).0), 3);
    assert_eq!(ids(&|d| blob_content(d, b"state")), 3);
    assert_eq!(ids(&|d| SectionContent::new(d, None).finish()), 3);
}

#[test]
fn names_are_hidden_where_there_is_a_key() {
    assert_eq!(Domain::plain().name_key("web"), "web");
    let hidden = sealed().name_key("web");
    assert_eq!(hidden.len(), 64);
    assert_ne!(hidden, Domain::encrypted(&other_key()).name_key("web"));
}

#[test]
fn a_key_is_not_printed() {
    let hex: String = key().expose().iter().map(|b| format!("{b:02x}")).collect();
    for text in [format!("{:?}", key()), format!("{:?}", sealed())] {
        assert!(!text.contains(&hex[..16]), "{text}");
        assert!(text.contains(&sealed().id().to_string()));
    }
}

#[test]
fn what_has_a_nonce_needs_a_reader_of_version_3() {
    for (_, named) in named(&Domain::plain()) {
        let object = named.encode(&Domain::plain(), &NONCE);
        assert_eq!(object[8..12], [3, 0, 3, 0], "written by, and oldest that may read it");
    }
    let object = reference().encode(&Domain::plain());
    assert_eq!(object[8..12], [1, 0, 1, 0], "older readers share the store");
}

#[test]
fn the_same_name_with_another_nonce_has_other_bytes() {
    for (domain, (_, named)) in domains().iter().flat_map(|d| named(d).map(|n| (d, n))) {
        let (one, other) = (named.encode(domain, &NONCE), named.encode(domain, &[7; 16]));
        assert_ne!(one, other);
        assert_eq!(Named::decode(domain, None, &one), Named::decode(domain, None, &other));
    }
}

#[test]
fn a_tombstone_is_never_taken_for_a_reference() {
    for domain in domains() {
        let [(_, stands), (_, removed), _] = named(&domain);
        let decode = |named: &Named| Reference::decode(&domain, None, &named.encode(&domain, &NONCE));
        assert_eq!(decode(&stands), Ok(reference()));
        assert!(matches!(decode(&removed), Err(FormatError::Malformed { .. })));
        let other = Name::new("another").unwrap();
        let object = removed.encode(&domain, &NONCE);
        assert!(Named::decode(&domain, Some(&other), &object).is_err(), "put under another name");
    }
}
