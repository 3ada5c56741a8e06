//! A whole pack, of a raw footer, frames and the header's fields. Its name, checksum and compression, which nobody
//! could guess, are made right, so that the checks behind them are reached.
use dormouse_core::{Domain, FormatError, FrameHash, PackFooter, PackId, pack};

use crate::input::Input;

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (raw_footer, sound_start, fields) = (input.counted(), input.bool(), input.array::<24>());
    let (hashed, frames) = (input.bool(), input.rest());
    let domain = Domain::plain();
    let mut fields = fields.to_vec();
    if sound_start {
        fields.fill(0);
        (fields[0], fields[2]) = (1, 1);
    }
    let mut raw_footer = raw_footer.to_vec();
    let parsed = PackFooter::parse(&raw_footer);
    if let (true, Ok(mut footer)) = (hashed, parsed) {
        // Give the frames that are there the hashes that belong to them.
        for frame in &mut footer.frames {
            let start = frame.at.offset as usize - pack::HEADER_BYTES;
            if let Some(stored) = frames.get(start..start + frame.at.stored_bytes as usize) {
                frame.at.hash = FrameHash::of(stored);
            }
        }
        raw_footer = footer.to_raw();
    }
    let mut footer = (raw_footer.len() as u32).to_le_bytes().to_vec();
    footer.extend(zstd::bulk::compress(&raw_footer, 1).expect("zstd compresses"));
    let id = PackId::of(&footer);
    let mut trailer = [&b"DORMTAIL"[..], &fields, &(footer.len() as u32).to_le_bytes()].concat();
    trailer.extend_from_slice(&blake3::hash(&trailer).as_bytes()[..4]);
    let object = [&b"DORMPACK"[..], &fields, frames, &footer, &trailer].concat();

    if let Ok((found, damaged)) = pack::check_object(&domain, id, &object) {
        assert_eq!(found.to_raw(), raw_footer);
        for (index, frame) in found.frames.iter().enumerate() {
            let range = frame.at.range();
            let stored = &object[range.start as usize..range.end as usize];
            let decoded = frame.at.decode(&domain, stored);
            assert_eq!(decoded == Err(FormatError::HashMismatch("frame")), damaged.contains(&index));
            let _ = frame.decode(&domain, stored);
        }
    }
    // And as it came, without help.
    let _ = pack::check_object(&domain, id, frames);
}
