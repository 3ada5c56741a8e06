//! The NBD server against the real clients, and against peers that break the protocol.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod support;

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use dormouse_disk::{
    Disk,
    nbd::{Server, handshake, protocol::option},
};
use support::{PAGE, crash::Files, open, options, read, source::TestSource};

const SIZE: usize = 512 * PAGE;

struct Scene {
    source: Arc<TestSource>,
    files: Arc<Files>,
    disk: Arc<Disk>,
    server: Server,
    dir: tempfile::TempDir,
}

fn scene() -> Scene {
    let (source, files) = (TestSource::with_cache(SIZE, true), Files::new());
    let disk = Arc::new(open(&source, SIZE as u64, &files).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(disk.clone(), "root", &dir.path().join("nbd.sock")).unwrap();
    Scene { source, files, disk, server, dir }
}

impl Scene {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///root?socket={}", self.socket().display())
    }
}

/// Whether the real clients are here. What lacks is said; with `DORMOUSE_REQUIRE_NBD=1` it fails.
fn clients_are_here() -> bool {
    let missing = ["qemu-img", "qemu-io", "nbdinfo", "nbdcopy"]
        .into_iter()
        .find(|client| Command::new(client).arg("--version").output().is_err());
    if let Some(client) = missing {
        assert!(std::env::var_os("DORMOUSE_REQUIRE_NBD").is_none_or(|it| it != "1"), "no {client} here");
        dormouse_testkit::skipped!("no {client} here (apt-get install qemu-utils libnbd-bin)");
    }
    missing.is_none()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

#[test]
fn real_clients_read_the_image_byte_for_byte() {
    if !clients_are_here() {
        return;
    }
    let scene = scene();
    scene.disk.write(3 * PAGE as u64 + 512, &[9; 5_000]).unwrap();
    scene.disk.discard(40 * PAGE as u64, 80 * PAGE as u64).unwrap();
    let expected = read(&scene.disk, 0, SIZE);
    let file = |name: &str| scene.dir.path().join(name).display().to_string();
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &scene.uri(), &file("by-qemu")]);
    run("nbdcopy", &["--connections=4", &scene.uri(), &file("by-libnbd")]);
    run("nbdcopy", &["--synchronous", &scene.uri(), &file("in-order")]);
    for name in ["by-qemu", "by-libnbd", "in-order"] {
        assert!(fs::read(file(name)).unwrap() == expected, "{name}");
    }
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &scene.uri(), &file("by-qemu")]);
    assert_eq!(scene.source.bytes().len(), SIZE);
}

#[test]
fn real_clients_see_what_the_export_can() {
    if !clients_are_here() {
        return;
    }
    let scene = scene();
    let info = run("nbdinfo", &["--json", &scene.uri()]);
    for line in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
        "base:allocation",
    ] {
        assert!(info.contains(line), "{line} is not in {info}");
    }
    assert_eq!(run("nbdinfo", &["--size", &scene.uri()]).trim(), SIZE.to_string());
    assert!(run("nbdinfo", &["--list", &scene.uri()]).contains("export=\"root\""));
    // Frames of eight pages, of which every third is zero.
    let map = run("nbdinfo", &["--map", &scene.uri()]);
    let first: Vec<Vec<&str>> = map.lines().take(2).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(first, [["0", "65536", "0", "data"], ["65536", "32768", "3", "hole,zero"]]);
    let other = scene.uri().replace("/root?", "/other?");
    assert!(!Command::new("nbdinfo").arg(other).output().unwrap().status.success());
}

#[test]
fn flushed_writes_of_a_real_client_survive() {
    if !clients_are_here() {
        return;
    }
    let scene = scene();
    let mut expected = scene.source.bytes().to_vec();
    expected[1536..10_536].fill(0x5a);
    expected[16_384..32_768].fill(0);
    expected[40_960..45_056].fill(0);
    expected[65_536..70_000].fill(0x11);
    let commands = [
        "write -P 0x5a 1536 9000",
        "write -z 16384 16384",
        "discard 40960 4096",
        "write -f -P 0x11 65536 4464",
        "flush",
        "read -P 0x5a 1536 9000",
        "read -P 0 16384 16384",
        "read -P 0x11 65536 4464",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let uri = scene.uri();
    arguments.push(&uri);
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
    let crashed = scene.files.after_crash(|| false);
    let disk = open(&scene.source, SIZE as u64, &crashed).unwrap();
    assert!(read(&disk, 0, SIZE) == expected);
}

#[test]
fn real_client_cannot_write_to_read_only_export() {
    if !clients_are_here() {
        return;
    }
    let source = TestSource::new(SIZE);
    let disk = Arc::new(Disk::open(options(source, SIZE as u64, None)).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let _server = Server::start(disk, "root", &socket).unwrap();
    let uri = format!("nbd+unix:///root?socket={}", socket.display());
    assert!(run("nbdinfo", &["--json", &uri]).contains("\"is_read_only\": true"));
    let wrote = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &uri]).output().unwrap();
    assert!(!wrote.status.success());
}

/// A client of bytes.
struct Raw(UnixStream);

impl Raw {
    fn connect(socket: &Path) -> Self {
        let mut raw = Raw(UnixStream::connect(socket).unwrap());
        raw.take(18);
        raw.0.write_all(&3u32.to_be_bytes()).unwrap();
        raw
    }

    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut taken = vec![0; bytes];
        self.0.read_exact(&mut taken).unwrap();
        taken
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let length = (data.len() as u32).to_be_bytes();
        self.0.write_all(&[b"IHAVEOPT", &option.to_be_bytes()[..], &length, data].concat()).unwrap();
    }

    /// Goes over to requests, with simple replies.
    fn go(socket: &Path) -> Self {
        let mut raw = Raw::connect(socket);
        raw.option(option::EXPORT_NAME, b"");
        raw.take(10);
        raw
    }

    fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32) {
        let (magic, cookie) = (0x2560_9513u32.to_be_bytes(), 77u64.to_be_bytes());
        let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
        let parts = [&magic[..], &flags, &command, &cookie, &offset.to_be_bytes(), &length.to_be_bytes()];
        self.0.write_all(&parts.concat()).unwrap();
    }

    /// The error of the next answer.
    fn error(&mut self) -> u32 {
        let reply = self.take(16);
        assert_eq!((&reply[..4], &reply[8..]), (&0x6744_6698u32.to_be_bytes()[..], &77u64.to_be_bytes()[..]));
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    /// Whether the server has closed the connection.
    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

#[test]
fn hostile_requests_are_refused_and_the_next_served() {
    let scene = scene();
    let mut raw = Raw::go(&scene.socket());
    let size = SIZE as u64;
    for (flags, command, offset, length, error) in [
        (0, 0, size, 1, 22),
        (0, 0, u64::MAX, 4096, 22),
        (0, 0, 0, u32::MAX, 22),
        (1 << 9, 0, 0, 512, 22),
        (0, 4, size - 1, u32::MAX, 28),
        (0, 6, u64::MAX - 1, 4096, 28),
        (0, 7, 0, 4096, 22),
        (0, 99, 0, 4096, 22),
        (0, 3, u64::MAX, u32::MAX, 0),
    ] {
        raw.request(flags, command, offset, length);
        assert_eq!(raw.error(), error, "command {command} at {offset}");
    }
    // The data of a write that is refused is not taken for a request.
    raw.request(0, 1, size, 4096);
    raw.0.write_all(&[0x25; 4096]).unwrap();
    assert_eq!(raw.error(), 28);
    raw.request(0, 0, 0, 512);
    assert_eq!(raw.error(), 0);
    assert!(raw.take(512) == scene.source.bytes()[..512]);
}

#[test]
fn broken_protocol_ends_that_connection_alone() {
    let scene = scene();
    let mut kept = Raw::go(&scene.socket());
    let mut no_request = Raw::go(&scene.socket());
    no_request.0.write_all(&[0xff; 28]).unwrap();
    assert!(no_request.is_closed());
    let mut huge_write = Raw::go(&scene.socket());
    huge_write.request(0, 1, 0, u32::MAX);
    assert!(huge_write.is_closed());
    let mut no_option = Raw::connect(&scene.socket());
    no_option.0.write_all(&[0; 16]).unwrap();
    assert!(no_option.is_closed());
    let mut unbounded = Raw::connect(&scene.socket());
    unbounded.0.write_all(&[b"IHAVEOPT", &7u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat()).unwrap();
    assert!(unbounded.is_closed());
    let mut endless = Raw::connect(&scene.socket());
    for _ in 0..256 {
        endless.option(option::LIST, &[]);
    }
    endless.take(256 * (20 + 8 + 20));
    assert!(endless.is_closed());
    // Half a write, then nothing.
    let mut half = Raw::go(&scene.socket());
    half.request(0, 1, 0, 4096);
    half.0.write_all(&[1; 100]).unwrap();
    drop(half);
    kept.request(0, 0, 0, 512);
    assert_eq!(kept.error(), 0);
    assert!(kept.take(512) == scene.source.bytes()[..512], "half a write is none");
}

#[test]
fn too_long_option_is_refused_and_the_next_answered() {
    let scene = scene();
    let mut raw = Raw::connect(&scene.socket());
    raw.option(option::GO, &vec![0; 70_000]);
    assert_eq!(raw.take(20)[12..16], (1u32 << 31 | 9).to_be_bytes());
    raw.take(8);
    raw.option(option::ABORT, &[]);
    assert_eq!(raw.take(20)[12..16], 1u32.to_be_bytes());
    assert!(raw.is_closed());
    assert!(!handshake::greeting().is_empty());
}

#[test]
fn slow_base_does_not_stop_other_requests() {
    let scene = scene();
    scene.disk.write(0, &[5; PAGE]).unwrap();
    scene.source.hold();
    let mut raw = Raw::go(&scene.socket());
    raw.request(0, 0, 8 * PAGE as u64, 512);
    scene.source.wait_asked(1);
    // Asked later, answered first.
    raw.request(0, 0, 0, 512);
    assert_eq!(raw.error(), 0);
    assert_eq!(raw.take(512), [5; 512]);
    scene.source.release();
    assert_eq!(raw.error(), 0);
    assert!(raw.take(512) == scene.source.bytes()[8 * PAGE..8 * PAGE + 512]);
}

#[test]
fn failed_flush_is_told_to_every_client() {
    let scene = scene();
    let (mut first, mut second) = (Raw::go(&scene.socket()), Raw::go(&scene.socket()));
    first.request(0, 1, 0, 4096);
    first.0.write_all(&[1; 4096]).unwrap();
    assert_eq!(first.error(), 0);
    scene.files.fail_sync(0);
    second.request(0, 3, 0, 0);
    assert_eq!(second.error(), 5);
    for client in [&mut first, &mut second] {
        client.request(0, 3, 0, 0);
        assert_eq!(client.error(), 5);
    }
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let scene = scene();
    let mut clients: Vec<_> = (0..16).map(|_| Raw::go(&scene.socket())).collect();
    let mut turned_away = UnixStream::connect(scene.socket()).unwrap();
    assert_eq!(turned_away.read(&mut [0; 18]).unwrap(), 0);
    clients[0].request(0, 0, 0, 512);
    assert_eq!(clients[0].error(), 0);
    assert_eq!(scene.server.clients(), 16);
}

#[test]
fn socket_in_use_is_not_taken_over() {
    let scene = scene();
    let again = Server::start(scene.disk.clone(), "root", &scene.socket()).err().unwrap();
    assert_eq!(again.kind(), std::io::ErrorKind::AddrInUse);
    let file = scene.dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(Server::start(scene.disk.clone(), "root", &file).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let socket = scene.socket();
    let Scene { server, dir, disk, .. } = scene;
    drop(server);
    assert!(!socket.exists());
    // A socket that a killed server left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let _server = Server::start(disk, "root", &socket).unwrap();
    Raw::go(&socket);
    drop(dir);
}
