//! A front end: a disk as an NBD export over a Unix socket.
//!
//! | module | holds |
//! |---|---|
//! | [`protocol`] | the bytes of the protocol, as pure functions |
//! | [`handshake`] | what client and server agree on before the first request; pure |
//! | `connection` | one client: a thread that reads requests, and some that carry them out |
//! | `server` | the socket, and its bounds |
//!
//! The protocol is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

mod connection;
pub mod handshake;
pub mod protocol;
mod requests;
mod server;

pub use server::Server;
