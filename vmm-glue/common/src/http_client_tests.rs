use super::*;
use crate::http::HEAD_BYTES_MAX;
use proptest::prelude::*;

const REFUSAL: &[u8] =
    b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nContent-Length: 27\r\n\r\n{\"fault_message\":\"because\"}";

#[test]
fn a_response_is_whole_only_with_its_last_byte() {
    let whole = b"HTTP/1.1 200 \r\nServer: x\r\nContent-Length: 4\r\n\r\nnull";
    for length in 0..whole.len() {
        assert_eq!(parse_response(&whole[..length]), Ok(None), "cut to {length}");
    }
    let response = Response { status: 200, body: b"null".to_vec() };
    assert_eq!(parse_response(whole), Ok(Some(response)));
    let empty = parse_response(b"HTTP/1.1 204 \r\n\r\n").expect("valid").expect("whole");
    assert_eq!((empty.status, empty.body.len()), (204, 0));
}

#[test]
fn a_refusal_is_told_in_the_vmms_words() {
    let response = parse_response(REFUSAL).expect("valid").expect("whole");
    let error = interpret("PUT /vm".to_owned(), &response).expect_err("refused").to_string();
    assert_eq!(error, "the VMM refused PUT /vm with status 400: because");
}

#[test]
fn what_no_vmm_sends_is_refused() {
    for (bytes, part) in [
        (&b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n"[..], "no number"),
        (b"HTTP/1.1 200 \r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "two"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", "longer"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
        (b"SSH-2.0-OpenSSH\r\n", "invalid"),
    ] {
        let error = parse_response(bytes).expect_err("must be refused");
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
    let endless = [b"HTTP/1.1 200 \r\nX: ".to_vec(), vec![b'a'; HEAD_BYTES_MAX]].concat();
    assert!(parse_response(&endless).is_err());
    let whole = [endless, b"\r\n\r\n".to_vec()].concat();
    assert!(
        parse_response(&whole).is_err(),
        "a head that is too long was taken because it came in one piece"
    );
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_response(&bytes);
        let _ = parse_response(&[b"HTTP/1.1 200 \r\n", bytes.as_slice()].concat());
    }
}
