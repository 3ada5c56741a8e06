//! Frames: hostile stored bytes whose hash is right, references, and round trips.
use dormouse_core::{
    Codec, Domain, DomainKey, FrameHash, FrameRef,
    frame::EncodedFrame,
    limits::META_FRAME_BYTES_MAX,
    wire::{Reader, Writer},
};

use crate::input::Input;

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (raw_bytes, codec, stored) = (input.u32(), input.u8(), input.rest());
    let codec = [Codec::Raw, Codec::Zstd, Codec::Lz4][usize::from(codec % 3)];
    let (stored_bytes, hash) = (stored.len() as u32, FrameHash::of(stored));
    let at = FrameRef { pack: 0, offset: 32, stored_bytes, raw_bytes, codec, hash };
    if let Ok(raw) = at.decode(&Domain::plain(), stored) {
        assert_eq!(raw.len(), raw_bytes as usize);
        assert!(raw.len() <= META_FRAME_BYTES_MAX);
    }
    // Decoded bit by bit it is the same, or refused.
    let by_bits = at.begin(&Domain::plain(), stored.to_vec(), Vec::new()).and_then(|mut prefix| {
        for bytes in [1, raw_bytes as usize / 2, raw_bytes as usize] {
            prefix.reach(bytes)?;
            assert!(prefix.bytes().len() >= bytes.min(raw_bytes as usize));
        }
        assert!(prefix.is_whole());
        Ok(prefix.into_buffers().0)
    });
    if let Ok(by_bits) = by_bits {
        assert_eq!(at.decode(&Domain::plain(), stored), Ok(by_bits));
    }
    let sealed = Domain::encrypted(&DomainKey::new([7; 32]));
    assert!(at.decode(&sealed, stored).is_err(), "nobody guesses a sealed frame");

    for domain in [Domain::plain(), sealed] {
        if !stored.is_empty() {
            let for_speed = EncodedFrame::encode_for_speed(&domain, stored);
            for frame in [EncodedFrame::encode(&domain, stored, 1), for_speed] {
                let at = FrameRef {
                    stored_bytes: frame.stored.len() as u32,
                    raw_bytes: frame.raw_bytes,
                    codec: frame.codec,
                    hash: frame.hash,
                    ..at
                };
                assert_eq!(at.decode(&domain, &frame.stored).as_deref(), Ok(stored));
            }
        }
    }

    let mut r = Reader::new(stored, "frame reference");
    if let Ok(at) = FrameRef::read(&mut r, 1 + raw_bytes as usize % 4) {
        let mut w = Writer::new();
        at.write(&mut w);
        assert_eq!(w.finish(), stored[..stored.len() - r.remaining()]);
        assert!(at.range().end <= dormouse_core::limits::PACK_BYTES_MAX);
    }
}
