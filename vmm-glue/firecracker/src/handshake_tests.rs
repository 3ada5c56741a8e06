//! Peers of every kind at the handshake socket, the right one included.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::*;
use dormouse_vmm_common::ListenError;

const PATIENCE: Duration = Duration::from_secs(20);
const GOOD: &[u8] = br#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]"#;

struct Scene {
    listener: HandshakeListener,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn scene() -> Scene {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("uffd.sock");
    Scene { listener: HandshakeListener::bind(&path).expect("bind"), path, _directory: directory }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty());
    assert_eq!(sent.expect("send"), bytes.len());
}

fn uffd() -> Option<OwnedFd> {
    match crate::sys::userfaultfd::create() {
        Ok(fd) => Some(fd),
        Err(error) => {
            let required = std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_some_and(|v| v == "1");
            assert!(!required, "DORMOUSE_REQUIRE_UFFD=1, but userfaultfd is refused: {error}");
            dormouse_testkit::skipped!("userfaultfd is refused: {error}");
            None
        }
    }
}

/// What the handshake makes of a peer that does `act` and then closes the connection.
fn outcome(act: impl FnOnce(&mut UnixStream)) -> Result<Handshake, HandshakeError> {
    let scene = scene();
    let mut peer = UnixStream::connect(&scene.path).expect("connect");
    act(&mut peer);
    drop(peer);
    let outcome = accept_handshake(&scene.listener, PATIENCE);
    assert!(matches!(accept_handshake(&scene.listener, Duration::ZERO), Err(HandshakeError::NobodyCame(_))));
    outcome
}

fn pipe_is_closed(mut write_end: File) -> bool {
    // Only this process had the read end, so a copy left open anywhere would let the write succeed.
    write_end.write_all(b"x").is_err()
}

fn pipe() -> (OwnedFd, File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    (read, File::from(write))
}

#[test]
fn firecracker_itself_is_welcome_and_its_connection_stays_open() {
    let Some(fd) = uffd() else { return };
    let scene = scene();
    let peer = UnixStream::connect(&scene.path).expect("connect");
    send(&peer, GOOD, &[fd.as_fd()]);
    let shake = accept_handshake(&scene.listener, PATIENCE).expect("handshake");
    assert_eq!((shake.regions.len(), shake.regions[0].bytes), (1, 8192));
    assert_eq!(shake.peer.pid, std::process::id() as i32);
    let flags = rustix::io::fcntl_getfd(&shake.uffd).expect("flags");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    assert!(!readable_by(shake.connection.as_fd(), Instant::now()).expect("poll"), "alive");
    drop(peer);
    assert!(readable_by(shake.connection.as_fd(), Instant::now() + PATIENCE).expect("poll"), "ended");
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let Some(fd) = uffd() else { return };
    let shake = outcome(|peer| {
        send(peer, &GOOD[..30], &[fd.as_fd()]);
        send(peer, &GOOD[30..], &[]);
    });
    assert_eq!(shake.expect("handshake").regions.len(), 1);
}

#[test]
fn nobody_at_all() {
    let scene = scene();
    let error = accept_handshake(&scene.listener, Duration::from_millis(1)).expect_err("nobody");
    assert!(matches!(error, HandshakeError::NobodyCame(_)), "{error}");
}

#[test]
fn a_peer_that_connects_and_closes() {
    assert!(matches!(outcome(|_| {}), Err(HandshakeError::HungUp { bytes: 0 })));
}

#[test]
fn a_peer_that_closes_in_the_middle() {
    let error = outcome(|peer| send(peer, &GOOD[..30], &[]));
    assert!(matches!(error, Err(HandshakeError::HungUp { bytes: 30 })));
}

#[test]
fn a_peer_that_falls_silent_in_the_middle() {
    let scene = scene();
    let peer = UnixStream::connect(&scene.path).expect("connect");
    send(&peer, &GOOD[..30], &[]);
    let error = accept_handshake(&scene.listener, Duration::from_millis(20)).expect_err("silent");
    assert!(matches!(error, HandshakeError::Stalled { bytes: 30 }), "{error}");
}

#[test]
fn nonsense_is_named_and_its_descriptor_closed() {
    let (read, write) = pipe();
    let error = outcome(move |peer| send(peer, b"GET / HTTP/1.1\r\n\r\n", &[read.as_fd()]));
    assert!(matches!(error, Err(HandshakeError::Regions(RegionsError::Json(_)))), "{error:?}");
    assert!(pipe_is_closed(write));
}

#[test]
fn overlapping_regions_are_named_and_the_descriptor_closed() {
    let (read, write) = pipe();
    let region = String::from_utf8_lossy(&GOOD[1..GOOD.len() - 1]).into_owned();
    let error = outcome(move |peer| send(peer, format!("[{region},{region}]").as_bytes(), &[read.as_fd()]));
    assert!(matches!(error, Err(HandshakeError::Regions(RegionsError::Overlap { .. }))), "{error:?}");
    assert!(pipe_is_closed(write));
}

#[test]
fn no_descriptor() {
    let error = outcome(|peer| send(peer, GOOD, &[]));
    assert!(matches!(error, Err(HandshakeError::Descriptors { count: 0 })), "{error:?}");
}

#[test]
fn surplus_descriptors_are_all_closed() {
    for surplus in [2, 4, 8] {
        let (read, write) = pipe();
        let error = outcome(move |peer| send(peer, GOOD, &vec![read.as_fd(); surplus]));
        assert!(matches!(error, Err(HandshakeError::Descriptors { .. })), "{surplus}: {error:?}");
        assert!(pipe_is_closed(write), "{surplus}");
    }
}

#[test]
fn a_descriptor_in_each_of_two_pieces() {
    let (read, write) = pipe();
    let error = outcome(move |peer| {
        send(peer, &GOOD[..30], &[read.as_fd()]);
        send(peer, &GOOD[30..], &[read.as_fd()]);
    });
    assert!(matches!(error, Err(HandshakeError::Descriptors { count: 2 })), "{error:?}");
    assert!(pipe_is_closed(write));
}

#[test]
fn a_descriptor_of_another_kind() {
    let (read, write) = pipe();
    let error = outcome(move |peer| send(peer, GOOD, &[read.as_fd()])).expect_err("a pipe");
    assert!(
        matches!(&error, HandshakeError::NotUserfaultfd { found } if found.starts_with("pipe:")),
        "{error}"
    );
    assert!(pipe_is_closed(write));
}

#[test]
fn too_long_a_message() {
    let scene = scene();
    let path = scene.path.clone();
    let peer = std::thread::spawn(move || {
        let mut peer = UnixStream::connect(path).expect("connect");
        let _ = peer.write_all(&vec![b' '; 4 * MESSAGE_BYTES_MAX]);
    });
    let error = accept_handshake(&scene.listener, PATIENCE).expect_err("too long");
    assert!(matches!(error, HandshakeError::Regions(RegionsError::TooLong { .. })), "{error}");
    peer.join().expect("the peer is not left waiting");
}

#[test]
fn a_process_of_another_user() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("uffd.sock");
    let listener = match HandshakeListener::bind_for(&path, 12345) {
        Ok(listener) => listener,
        Err(error) => return dormouse_testkit::skipped!("giving away a socket takes privilege: {error}"),
    };
    let _peer = UnixStream::connect(&path).expect("connect");
    let error = accept_handshake(&listener, PATIENCE).expect_err("wrong user");
    assert!(matches!(error, HandshakeError::WrongUser { allowed: 12345, .. }), "{error}");
}

#[test]
fn a_bad_peer_does_not_disturb_the_good_one_behind_it() {
    let Some(fd) = uffd() else { return };
    let scene = scene();
    let bad = UnixStream::connect(&scene.path).expect("connect");
    let good = UnixStream::connect(&scene.path).expect("connect");
    send(&bad, b"nonsense", &[]);
    send(&good, GOOD, &[fd.as_fd()]);
    accept_handshake(&scene.listener, PATIENCE).expect_err("nonsense");
    accept_handshake(&scene.listener, PATIENCE).expect("the good one");
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_listener() {
    let scene = scene();
    assert_eq!(mode(&scene.path), 0o600);
    drop(scene.listener);
    assert!(!scene.path.exists());
}

#[test]
fn only_a_socket_nobody_listens_on_is_replaced() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).expect("bind"));
    assert!(std::fs::symlink_metadata(&path).expect("stale").file_type().is_socket());
    let listener = HandshakeListener::bind(&path).expect("stale socket replaced");
    let error = HandshakeListener::bind(&path).expect_err("in use");
    assert!(matches!(error, ListenError::InUse(_)), "{error}");
    drop(listener);

    std::fs::write(&path, "precious").expect("write");
    let error = HandshakeListener::bind(&path).expect_err("a file");
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("link");
    let error = HandshakeListener::bind(&link).expect_err("a link");
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&path).expect("left alone"), "precious");
    let long = directory.path().join("x".repeat(120));
    assert!(matches!(HandshakeListener::bind(&long), Err(ListenError::TooLong(_))));
}

#[test]
fn a_listener_does_not_remove_its_successors_socket() {
    let first = scene();
    std::fs::remove_file(&first.path).expect("remove");
    let second = HandshakeListener::bind(&first.path).expect("bind");
    drop(first.listener);
    assert!(first.path.exists());
    drop(second);
}
