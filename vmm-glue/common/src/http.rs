//! HTTP/1.1 responses, as far as Firecracker sends them: a pure parser with limits, upon `httparse`.

/// Most bytes a response's head may have.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most bytes a response's body may have.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
const HEADERS_MAX: usize = 32;

/// A response: status and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// The body, as long as its `Content-Length` says; empty without one.
    pub body: Vec<u8>,
}

/// The response at the start of `bytes`; `None` if it is not whole yet. Pure.
///
/// # Errors
/// What is wrong with it.
pub fn parse_response(bytes: &[u8]) -> Result<Option<Response>, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let body_at = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_BYTES_MAX => length,
        // However it came: in one piece or cut short.
        Ok(httparse::Status::Partial) if bytes.len() <= HEAD_BYTES_MAX => return Ok(None),
        Ok(_) => return Err(format!("its head is longer than {HEAD_BYTES_MAX} bytes")),
        Err(error) => return Err(error.to_string()),
    };
    let mut length = None;
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(header.value).unwrap_or_default().trim();
            let parsed: usize = text.parse().map_err(|_| "its Content-Length is no number".to_owned())?;
            if length.is_some_and(|before| before != parsed) {
                return Err("it has two Content-Lengths".to_owned());
            }
            length = Some(parsed);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err("it has a Transfer-Encoding, which Firecracker never sends".to_owned());
        }
    }
    let length = length.unwrap_or(0);
    if length > BODY_BYTES_MAX {
        return Err(format!("its body of {length} bytes is longer than {BODY_BYTES_MAX}"));
    }
    let status = head.code.unwrap_or(0);
    let body = bytes.get(body_at..).and_then(|rest| rest.get(..length));
    Ok(body.map(|body| Response { status, body: body.to_vec() }))
}
