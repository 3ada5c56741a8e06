//! The answers of a VMM's API, whole and in pieces.
use dormouse_vmm_common::http::{BODY_BYTES_MAX, HEAD_BYTES_MAX, parse_response};

pub(crate) fn check(bytes: &[u8]) {
    let Ok(Some(response)) = parse_response(bytes) else { return };
    assert!(response.body.len() <= BODY_BYTES_MAX && bytes.len() >= response.body.len());
    // What follows it is not looked at.
    let followed = [bytes, b"HTTP/1.1 500 \r\n\r\n"].concat();
    assert_eq!(parse_response(&followed), Ok(Some(response.clone())));
    if bytes.len() > 4096 {
        return; // Every cut is tried.
    }
    let whole = (0..=bytes.len()).find(|cut| parse_response(&bytes[..*cut]) == Ok(Some(response.clone())));
    let whole = whole.expect("it is there");
    assert!(whole <= HEAD_BYTES_MAX + response.body.len());
    for cut in (0..whole).rev().step_by(1 + whole / 64) {
        assert_eq!(parse_response(&bytes[..cut]), Ok(None), "cut to {cut} of {whole}");
    }
}
