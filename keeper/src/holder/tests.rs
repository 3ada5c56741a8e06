use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::*;
use crate::{KeepError, Keeper, KeptSnapshot, KeptVm, VmId, VmRecord, descriptors};
use crate::{KeptOptions, PageSize, Region};

/// A holder on a thread of this process.
struct Held {
    directory: tempfile::TempDir,
    thread: JoinHandle<Result<Ended, HolderError>>,
}

impl Held {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let options =
            HolderOptions { socket: directory.path().join("hold"), linger: Duration::from_millis(200) };
        let thread = std::thread::spawn(move || hold(&options));
        Held { directory, thread }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("hold")
    }

    fn client(&self) -> HolderKeeper {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match HolderKeeper::connect(&self.socket(), None) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }

    fn ended(self) -> Ended {
        self.thread.join().expect("the holder does not panic").expect("the holder does not fail")
    }
}

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).expect("memfd")
}

pub(crate) fn vm(id: &str, process: &std::process::Child) -> KeptVm {
    let pid = Pid::from_raw(process.id() as i32).expect("a number");
    let id = VmId::new(id).expect("an id");
    let snapshot: KeptSnapshot = serde_json::from_value(
        serde_json::json!({"name": "monday", "snapshot": "00".repeat(32), "reference": ""}),
    )
    .expect("a snapshot");
    let record = VmRecord {
        id,
        snapshot,
        regions: vec![Region { host: 4096, bytes: 4096, offset: 0, page_size: PageSize::Small }],
        options: KeptOptions::default(),
        pid: process.id() as i32,
        uid: 0,
        api_socket: None,
        notes: BTreeMap::new(),
    };
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
    KeptVm { record, uffd: memfd("one"), states: memfd("two"), process }
}

/// A process that runs until it is killed.
pub(crate) struct Sleeper(pub(crate) std::process::Child);

impl Sleeper {
    pub(crate) fn start() -> Self {
        Sleeper(std::process::Command::new("sleep").arg("1000").spawn().expect("sleep"))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ids(vms: &[KeptVm]) -> Vec<&str> {
    vms.iter().map(|vm| vm.record.id.as_str()).collect()
}

/// Takes until there is something: a closed connection is noticed in its own time.
fn taken(client: &HolderKeeper) -> Vec<KeptVm> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let taken = client.take_all().expect("taken");
        if !taken.is_empty() {
            return taken;
        }
        assert!(Instant::now() < deadline, "nothing to take");
    }
}

fn inode(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).expect("stat").st_ino
}

#[test]
fn what_is_kept_goes_to_the_next_and_to_nobody_else() {
    let (held, process) = (Held::start(), Sleeper::start());
    let (one, two) = (held.client(), held.client());
    let (first, second) = (vm("a", &process.0), vm("b", &process.0));
    one.keep(&first).expect("kept");
    one.keep(&second).expect("kept");
    assert!(two.take_all().expect("asked").is_empty(), "both are served");
    assert!(matches!(two.keep(&first), Err(KeepError::Refused(_))));
    assert!(matches!(two.release(&first.record.id), Err(KeepError::Refused(_))));
    drop(one);
    let mut got = taken(&two);
    assert_eq!(ids(&got), ["a", "b"]);
    let got = got.remove(0);
    assert_eq!(
        (inode(&got.uffd), inode(&got.states), inode(&got.process)),
        (inode(&first.uffd), inode(&first.states), inode(&first.process))
    );
    two.release(&first.record.id).expect("released");
    drop(two);
    let three = held.client();
    assert_eq!(ids(&taken(&three)), ["b"]);
    three.release(&second.record.id).expect("released");
    three.release(&second.record.id).expect("again is no error");
    drop(three);
    let socket = held.socket();
    assert_eq!(held.ended(), Ended::Idle);
    assert!(!socket.exists());
}

#[test]
fn a_vm_that_has_ended_is_let_go() {
    let (held, process) = (Held::start(), Sleeper::start());
    let client = held.client();
    client.keep(&vm("a", &process.0)).expect("kept");
    drop(process);
    drop(client);
    assert_eq!(held.ended(), Ended::Idle);
}

#[test]
fn one_holder_at_a_path() {
    let held = Held::start();
    let client = held.client();
    let options = HolderOptions { socket: held.socket(), linger: Duration::ZERO };
    assert_eq!(hold(&options).expect("no error"), Ended::AnotherIsThere);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(held.socket()).expect("socket").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    drop(client);
    held.ended();
    let file = tempfile::NamedTempFile::new().expect("file");
    let options = HolderOptions { socket: file.path().to_owned(), linger: Duration::ZERO };
    assert!(matches!(hold(&options), Err(HolderError::NotASocket(_))), "a file is left alone");
}

/// Says `message` with `descriptors`, and gives what is answered.
fn say(socket: &Path, greet: bool, message: &[u8], descriptors: &[OwnedFd]) -> Option<String> {
    let connection = super::socket::connect(socket).expect("connected");
    let mut buffer = vec![0; message::MESSAGE_BYTES_MAX];
    let mut say = |message: &[u8], fds: &[_]| {
        descriptors::send(connection.as_fd(), None, message, fds).ok()?;
        let (bytes, _) = descriptors::receive(connection.as_fd(), &mut buffer).ok()?;
        (bytes > 0).then(|| String::from_utf8_lossy(&buffer[..bytes]).into_owned())
    };
    if greet {
        say(b"{\"do\":\"hello\",\"version\":1}\n", &[])?;
    }
    let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    say(message, &fds)
}

#[test]
fn nonsense_is_refused_and_disturbs_nobody() {
    let (held, process) = (Held::start(), Sleeper::start());
    let client = held.client();
    client.keep(&vm("a", &process.0)).expect("kept");
    let socket = held.socket();
    let refused = |greet, message: &[u8], descriptors: &[OwnedFd], part: &str| {
        let answer = say(&socket, greet, message, descriptors).expect("an answer");
        assert!(answer.contains("refused") && answer.contains(part), "{answer}");
    };
    refused(false, b"{\"do\":\"take\"}\n", &[], "hello first");
    refused(false, b"{\"do\":\"hello\",\"version\":2}\n", &[], "version 1");
    refused(true, b"GET / HTTP/1.1\r\n", &[], "makes no sense");
    refused(true, b"no line", &[], "no line");
    refused(true, b"{\"do\":\"keep\",\"id\":\"b\"}\n", &[], "three descriptors");
    refused(true, b"{\"do\":\"keep\",\"id\":\"../b\"}\n", &[], "makes no sense");
    refused(true, b"{\"do\":\"keep\",\"id\":\"b\"}\n", &[memfd("x"), memfd("y")], "three descriptors");
    let too_long = vec![b'x'; message::MESSAGE_BYTES_MAX + 1];
    assert_eq!(say(&socket, true, &too_long, &[]), None, "hung up on");
    // One says nothing at all, and one leaves in the middle.
    let silent = super::socket::connect(&socket).expect("connected");
    drop(super::socket::connect(&socket).expect("connected"));
    // A descriptor that is no pidfd and always ready only loses its own VM.
    let three = [memfd("x"), memfd("y"), memfd("z")];
    assert!(say(&socket, true, b"{\"do\":\"keep\",\"id\":\"b\"}\n", &three).expect("kept").contains("done"));
    drop(client);
    let next = held.client();
    assert_eq!(ids(&taken(&next)), ["a"]);
    drop(silent);
}

/// As by a holder that may open no more files: the kernel drops the descriptors it has no room for. The connection was
/// closed for that, and with it went the word for all VMs that its process served.
#[test]
fn descriptors_for_which_there_is_no_room_are_refused_and_the_connection_lives() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let (held, process) = (Held::start(), Sleeper::start());
    let client = held.client();
    let connection = super::socket::connect(&held.socket()).expect("connected");
    let mut buffer = vec![0; message::MESSAGE_BYTES_MAX];
    let mut answer = || {
        let (bytes, _) = descriptors::receive(connection.as_fd(), &mut buffer).expect("an answer");
        String::from_utf8_lossy(&buffer[..bytes]).into_owned()
    };
    let many = [(); descriptors::DESCRIPTORS_MAX * 4].map(|()| memfd("x"));
    let fds: Vec<_> = many.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let keep = std::io::IoSlice::new(b"{\"do\":\"keep\",\"id\":\"a\"}\n");
    sendmsg(&connection, &[keep], &mut control, SendFlags::NOSIGNAL).expect("sent");
    let refused = answer();
    assert!(refused.contains("refused") && refused.contains("LimitNOFILE"), "{refused}");
    descriptors::send(connection.as_fd(), None, b"{\"do\":\"hello\",\"version\":1}\n", &[]).expect("sent");
    assert!(answer().contains("done"), "the connection is as good as before");
    client.keep(&vm("a", &process.0)).expect("nothing was kept by that name");
}

#[test]
fn what_somebody_kept_that_makes_no_sense_holds_up_no_other() {
    let (held, process) = (Held::start(), Sleeper::start());
    let client = held.client();
    let good = vm("m", &process.0);
    client.keep(&good).expect("kept");
    // Before and after it in order; each with a process that lives, so that the holder goes on holding it.
    let record = good.record.encode().expect("a record");
    for (id, record) in [("a", &b"no record"[..]), ("b", b""), ("z", &record)] {
        let process = good.process.try_clone().expect("duplicated");
        let message = [format!("{{\"do\":\"keep\",\"id\":\"{id}\"}}\n").as_bytes(), record].concat();
        let answer = say(&held.socket(), true, &message, &[memfd("x"), memfd("y"), process]);
        assert!(answer.expect("an answer").contains("done"));
    }
    // Nobody else's can be taken over in this way.
    let stolen =
        say(&held.socket(), true, b"{\"do\":\"keep\",\"id\":\"m\"}\n", &[memfd("x"), memfd("y"), memfd("z")]);
    assert!(stolen.expect("an answer").contains("served by another process"));
    drop(client);
    let next = held.client();
    assert_eq!(ids(&taken(&next)), ["m"]);
}

#[test]
fn a_holder_that_cannot_be_started_is_not_waited_for() {
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("hold");
    for (program, part) in [("/bin/false", "try it to see why"), ("/nonexistent/dormouse", "No such file")] {
        let error = HolderKeeper::connect(&socket, Some(Path::new(program))).expect_err(program);
        assert!(matches!(&error, KeepError::NoHolder { why, .. } if why.contains(part)), "{error}");
    }
    assert!(matches!(HolderKeeper::connect(&socket, None), Err(KeepError::NoHolder { .. })));
}
