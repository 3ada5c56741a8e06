//! A resume stream's head: raw, and as an object whose hash is computed so that the checks behind it are reached.
use dormouse_core::{
    Domain, PAGE_BYTES,
    stream::{StreamHead, StreamPart},
};

pub(crate) fn check(raw: &[u8]) {
    if let Ok(head) = StreamHead::parse(raw, 72) {
        let mut end = 72;
        for frame in &head.frames {
            assert_eq!(frame.at.range().start, end);
            end = frame.at.range().end;
            match &frame.part {
                StreamPart::State { blob } => assert!((*blob as usize) < head.blobs.len()),
                StreamPart::Pages { runs, .. } => {
                    let pages: u64 = runs.iter().map(|r| r.end - r.start).sum();
                    assert_eq!(pages as usize * PAGE_BYTES, frame.at.raw_bytes as usize);
                }
            }
        }
        assert_eq!(head.object_bytes(72), end);
    }
    let domain = Domain::plain();
    let _ = StreamHead::decode(&domain, raw);
    if raw.len() >= 72 {
        let mut object = raw.to_vec();
        let hash = blake3::Hasher::new().update(&raw[..40]).update(&raw[72..]).finalize();
        object[40..72].copy_from_slice(hash.as_bytes());
        let _ = StreamHead::decode(&domain, &object);
    }
}
