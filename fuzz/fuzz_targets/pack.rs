//! A whole pack. The input is the trailer's and header's middle, the raw footer's compressed form and the frames:
//! the hashes that nobody could guess are computed, so that the checks behind them are reached.
#![no_main]
use dormouse_core::{Domain, PackId, pack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8], [u8; 32], bool)| {
    let (frames, footer, start, same) = input;
    let domain = Domain::plain();
    let id = PackId::of(footer);
    let mut object = [&start[..], frames, footer].concat();
    let magic = if same { *b"DORMTAIL" } else { *b"DORMPACK" };
    let mut trailer = [&magic[..], &start[8..], &(footer.len() as u32).to_le_bytes()].concat();
    trailer.extend_from_slice(&blake3::hash(&trailer).as_bytes()[..4]);
    object.extend_from_slice(&trailer);
    if let Ok((found, damaged)) = pack::check_object(&domain, id, &object) {
        assert!(damaged.len() <= found.frames.len());
        assert!(start.starts_with(b"DORMPACK"));
        for (index, frame) in found.frames.iter().enumerate() {
            let range = frame.at.range();
            let stored = &object[range.start as usize..range.end as usize];
            let decoded = frame.decode(&domain, stored);
            assert!(decoded.is_err() || !damaged.contains(&index));
        }
    }
    // And as it came, without help.
    let _ = pack::check_object(&domain, id, frames);
});
