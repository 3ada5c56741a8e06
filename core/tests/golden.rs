//! One file per kind of object and per way to store it, written once and never edited.
//!
//! Where bytes do not depend on zstd or LZ4, what is written today must equal the file. Every file must still decode to
//! the same value. A new kind is added with `DORMOUSE_NEW_GOLDEN=1 cargo test -p dormouse-core --test golden`,
//! which writes files that are missing and never changes one that is there.
#![allow(clippy::unwrap_used)]

mod common;

use std::{collections::BTreeSet, path::PathBuf};

use common::*;
use dormouse_core::{
    frame::EncodedFrame,
    pack::{check_object, parse_trailer},
    stream::{StreamBuilder, StreamHead, StreamPart},
    *,
};

const CHANGED: &str = "the format changed: bump FORMAT_VERSION, add new golden files, never edit old ones";

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

type Check = Box<dyn Fn(&[u8])>;

/// A golden file and what must hold of it.
struct Golden {
    name: String,
    /// The object as it is written today.
    today: Vec<u8>,
    /// How many of its first bytes do not depend on the version of zstd.
    exact: usize,
    /// Decodes the file and compares it with the value it was made from.
    check: Check,
}

fn golden(name: String, today: Vec<u8>, check: impl Fn(&[u8]) + 'static) -> Golden {
    Golden { exact: today.len(), name, today, check: Box::new(check) }
}

/// A frame that compresses.
fn compressible() -> Vec<u8> {
    noise(12, 64).into_iter().cycle().take(3 * PAGE_BYTES).collect()
}

/// A stream of one frame of three pages.
fn stream(domain: &Domain, frame: &EncodedFrame) -> Vec<u8> {
    let (snapshot, root) = (SnapshotId(digest(80)), RootId(digest(81)));
    let mut builder = StreamBuilder::new(snapshot, root, b"a root's object".to_vec(), vec![]);
    builder.push(&StreamPart::Pages { image: 0, runs: vec![9..11, 3..4] }, frame);
    builder.finish(domain)
}

/// Every identity a store depends on: if one of them changed, nothing would be found again.
fn identities(domain: &Domain) -> String {
    let mut content = SectionContent::new(domain, Some(&digest(5)));
    content.change(3, None);
    content.change(258, Some(&ChunkId(digest(6))));
    [
        ("domain", domain.id().to_string()),
        ("chunk of noise", domain.chunk_id(&noise(1, PAGE_BYTES)).to_string()),
        ("snapshot", root().snapshot_id(domain).to_string()),
        ("section", ChunkId(content.finish()).to_string()),
        ("blob", ChunkId(blob_content(domain, b"device state")).to_string()),
        ("name", domain.name_key("web-1.prod")),
        ("frame hash", FrameHash::of(b"stored").to_string()),
        ("pack", PackId::of(b"footer").to_string()),
        ("root", RootId::of(b"object").to_string()),
    ]
    .iter()
    .map(|(what, id)| format!("{what}: {id}\n"))
    .collect()
}

fn all() -> Vec<Golden> {
    let mut all = vec![
        golden("v1-section-raw.bin".into(), section().encode(), |file| {
            assert_eq!(Section::decode(file), Ok(section()));
        }),
        golden("v1-root-raw.bin".into(), root().to_raw(), |file| assert_eq!(Root::parse(file), Ok(root()))),
    ];
    let rings = [
        ("wrapped", Keyring::Wrapped(other_key())),
        ("retired", Keyring::Retired { successor: other_key().id() }),
    ];
    for (what, ring) in rings {
        all.push(golden(format!("v1-keyring-{what}.bin"), ring.encode(&key()), move |file| {
            assert_eq!(format!("{:?}", Keyring::decode(&key(), file).unwrap()), format!("{ring:?}"));
        }));
    }
    for domain in domains() {
        let named = |what: &str, ending: &str| format!("v1-{what}-{}.{ending}", name_of(&domain));
        all.push(golden(named("identities", "txt"), identities(&domain).into_bytes(), |_| ()));

        let d = domain.clone();
        all.push(golden(named("reference", "bin"), reference().encode(&domain), move |file| {
            assert_eq!(Reference::decode(&d, Some(&reference().name), file), Ok(reference()));
        }));

        for (what, named) in common::named(&domain) {
            let (d, file) = (domain.clone(), format!("v3-{what}-{}.bin", name_of(&domain)));
            all.push(golden(file, named.encode(&domain, &NONCE), move |file| {
                assert_eq!(Named::decode(&d, Some(&reference().name), file), Ok(named.clone()));
            }));
        }

        let (d, file) = (domain.clone(), format!("v3-identity-{}.bin", name_of(&domain)));
        all.push(golden(file, identity().encode(&domain), move |file| {
            assert_eq!(Identity::decode(&d, file), Ok(identity()));
        }));

        let (raw, frame) = raw_frame(&domain, 11, 500);
        let (d, at_raw) = (domain.clone(), at(&frame));
        all.push(golden(named("frame-raw", "bin"), frame.stored, move |file| {
            assert_eq!(at_raw.decode(&d, file), Ok(raw.clone()));
        }));

        let frame = EncodedFrame::encode(&domain, &compressible(), 1);
        assert_eq!(frame.codec, Codec::Zstd);
        let (d, at_zstd) = (domain.clone(), at(&frame));
        all.push(Golden {
            exact: 0,
            ..golden(named("frame-zstd", "bin"), frame.stored, move |file| {
                let (stored_bytes, hash) = (file.len() as u32, FrameHash::of(file));
                let at = FrameRef { stored_bytes, hash, ..at_zstd };
                assert_eq!(at.decode(&d, file), Ok(compressible()));
            })
        });

        let frame = EncodedFrame::encode_for_speed(&domain, &compressible());
        assert_eq!(frame.codec, Codec::Lz4);
        let (d, at_lz4) = (domain.clone(), at(&frame));
        all.push(Golden {
            exact: 0,
            ..golden(format!("v2-frame-lz4-{}.bin", name_of(&domain)), frame.stored, move |file| {
                let (stored_bytes, hash) = (file.len() as u32, FrameHash::of(file));
                let at = FrameRef { stored_bytes, hash, ..at_lz4 };
                assert_eq!(at.decode(&d, file), Ok(compressible()));
            })
        });

        for (version, frame) in [
            (1, EncodedFrame::encode(&domain, &compressible(), 1)),
            (2, EncodedFrame::encode_for_speed(&domain, &compressible())),
        ] {
            let (d, object) = (domain.clone(), stream(&domain, &frame));
            all.push(Golden {
                exact: 32,
                ..golden(format!("v{version}-stream-{}.bin", name_of(&domain)), object, move |file| {
                    let head = StreamHead::decode(&d, file).unwrap();
                    assert_eq!((head.snapshot, head.root), (SnapshotId(digest(80)), RootId(digest(81))));
                    assert_eq!((head.root_object.as_slice(), head.pages()), (&b"a root's object"[..], 3));
                    let [frame] = &head.frames[..] else { panic!("one frame") };
                    assert_eq!(frame.part, StreamPart::Pages { image: 0, runs: vec![9..11, 3..4] });
                    let range = frame.at.range();
                    let stored = &file[range.start as usize..range.end as usize];
                    assert_eq!(frame.at.decode(&d, stored), Ok(compressible()));
                })
            });
        }

        let (_, object) = root().encode(&domain);
        let d = domain.clone();
        all.push(Golden {
            exact: 32,
            ..golden(named("root", "bin"), object, move |file| {
                assert_eq!(Root::decode(&d, RootId::of(file), file), Ok(root()));
            })
        });

        let (pack, object, footer) = pack(&domain);
        all.push(golden(named("footer-raw", "bin"), footer.to_raw(), {
            let footer = footer.clone();
            move |file| assert_eq!(PackFooter::parse(file), Ok(footer.clone()))
        }));
        let d = domain.clone();
        all.push(Golden {
            exact: pack.footer_offset as usize,
            ..golden(named("pack", "bin"), object, move |file| {
                let footer_bytes = u32::from_le_bytes(file[file.len() - 8..][..4].try_into().unwrap());
                let id = PackId::of(&file[pack.footer_offset as usize..][..footer_bytes as usize]);
                let found = parse_trailer(&d, id, file.len() as u64, &file[file.len() - 40..]);
                assert_eq!(found, Ok(pack::PackRef { id, footer_bytes, ..pack }));
                assert_eq!(check_object(&d, id, file), Ok((footer.clone(), vec![])));
                for frame in &footer.frames {
                    let range = frame.at.range();
                    frame.decode(&d, &file[range.start as usize..range.end as usize]).unwrap();
                }
            })
        });
    }
    all
}

#[test]
fn what_is_written_today_equals_the_golden_files() {
    for golden in all() {
        let path = directory().join(&golden.name);
        if std::env::var_os("DORMOUSE_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, &golden.today).unwrap();
        }
        let file = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        if golden.exact == golden.today.len() {
            assert!(file == golden.today, "{}: {CHANGED}", golden.name);
        }
        assert!(file[..golden.exact] == golden.today[..golden.exact], "{}: {CHANGED}", golden.name);
    }
}

#[test]
fn golden_files_still_decode_to_what_they_were_made_from() {
    for golden in all() {
        let file = std::fs::read(directory().join(&golden.name)).unwrap();
        (golden.check)(&file);
    }
}

#[test]
fn every_golden_file_is_asserted() {
    let tested: BTreeSet<String> = all().into_iter().map(|g| g.name).collect();
    let present: BTreeSet<String> = std::fs::read_dir(directory())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(present, tested);
}
