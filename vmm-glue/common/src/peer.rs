//! Who is at the other end of a connection.

use std::io;
use std::os::unix::net::UnixStream;

/// Who is at the other end, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
}

/// Who is at the other end of `connection`, by the kernel's word.
///
/// # Errors
/// It cannot be asked.
pub fn peer_of(connection: &UnixStream) -> io::Result<Peer> {
    let credentials = rustix::net::sockopt::socket_peercred(connection)?;
    Ok(Peer { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() })
}
