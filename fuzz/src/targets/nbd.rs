//! What an NBD client sends: options of the handshake, and headers of requests.
use dormouse_disk::nbd::{
    handshake::{Export, Handshake, Next},
    protocol::{OPTION_HEADER_BYTES, REQUEST_HEADER_BYTES, Request, option_header},
};

use crate::input::Input;

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input(bytes);
    let export = Export { name: "root".into(), size_bytes: 1 << 30, read_only: input.bool() };
    let Some(mut handshake) = Handshake::begin(export, input.array()) else { return };
    while !input.0.is_empty() {
        let Some((option, _)) = option_header(&input.array::<OPTION_HEADER_BYTES>()) else { break };
        match handshake.option(option, input.counted()) {
            Next::Option(answer) => check_answer(option, &answer),
            Next::Requests(_) => break,
            Next::Close(_) => return,
        }
        let agreed = handshake.agreed();
        assert!(agreed.structured || !agreed.block_status, "block status without structured replies");
    }
    while !input.0.is_empty() {
        if let Some(request) = Request::decode(&input.array::<REQUEST_HEADER_BYTES>()) {
            assert!(request.payload_bytes() <= request.buffer_bytes());
        }
    }
}

/// An answer is one or more replies to that option, whole.
fn check_answer(option: u32, mut answer: &[u8]) {
    assert!(!answer.is_empty(), "an option without an answer");
    while !answer.is_empty() {
        let (head, rest) = answer.split_at_checked(20).expect("a reply's header");
        assert!(head[..8] == 0x0003_e889_0455_65a9u64.to_be_bytes() && head[8..12] == option.to_be_bytes());
        let length = u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize;
        answer = rest.get(length..).expect("a reply's data");
    }
}
