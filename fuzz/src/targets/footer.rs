//! A pack's footer: what parses encodes back to the same bytes, and its frames lie in a pack without gaps.
use dormouse_core::{PackFooter, pack::HEADER_BYTES};

pub(crate) fn check(raw: &[u8]) {
    if let Ok(footer) = PackFooter::parse(raw) {
        assert_eq!(footer.to_raw(), raw);
        let mut end = HEADER_BYTES as u64;
        for frame in &footer.frames {
            assert_eq!(frame.at.range().start, end);
            end = frame.at.range().end;
        }
    }
}
