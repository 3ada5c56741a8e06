//! The store on a cloud's protocol, against a real server that speaks it; generic over which.
//!
//! Endpoint and credentials come from the environment, which a process cannot safely change for itself: each test
//! starts the server and runs itself again, as a child with the environment set.
#![allow(unreachable_pub, reason = "each test binary is a crate of its own")]

mod proxy;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use dormouse_chunkstore::{
    GcOptions, NoProgress, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{PutOutcome, faulty::FaultyBackend, open_url},
};
use dormouse_core::{Name, Named};

use crate::common::{Machine, fresh, objects};

/// Set in the child.
const ROLE: &str = "DORMOUSE_TEST_CLOUD_CHILD";

/// A kind of cloud and its server.
pub struct Cloud {
    /// What it is called.
    pub name: &'static str,
    /// Where its store is.
    pub url: &'static str,
    /// A bucket that is not there, and what is said of it.
    pub url_of_nothing: &'static str,
    pub no_such: &'static str,
    /// Set to 1, a missing server is a failure.
    pub require: &'static str,
    /// The variable with the path of the server, its name on `PATH`, and how it is started on a port of its choice.
    pub variable: &'static str,
    pub program: &'static str,
    pub arguments: &'static [&'static str],
    /// The request that makes the bucket.
    pub make_bucket: &'static str,
    /// The variables by which clients find it at an address.
    pub environment: fn(&str) -> Vec<(&'static str, String)>,
}

/// A server, until it is dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(cloud: &Cloud) -> Option<Self> {
        let program = std::env::var(cloud.variable).unwrap_or_else(|_| cloud.program.into());
        // Which of the two it says its address on, it says on a pipe of both.
        let (lines, said) = std::io::pipe().unwrap();
        let started = Command::new(&program)
            .args(cloud.arguments)
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn();
        let mut process = match started {
            Ok(process) => process,
            Err(e) => return Self::skip(cloud, &format!("{program}: {e}")),
        };
        let mut said = String::new();
        let mut lines = BufReader::new(lines).lines();
        while let Some(Ok(line)) = lines.next() {
            if let Some((_, address)) = line.split_once("http://") {
                let server = Server { process, address: address.trim().to_owned() };
                // Nobody reads what it says from here on, but it must be able to say it.
                thread::spawn(move || lines.for_each(drop));
                server.ask("PUT", cloud.make_bucket);
                return Some(server);
            }
            said.push_str(&line);
        }
        let _ = process.wait();
        Self::skip(cloud, &format!("{program} ended: {said}"))
    }

    fn skip(cloud: &Cloud, why: &str) -> Option<Self> {
        let (name, required) = (cloud.name, std::env::var(cloud.require));
        assert!(required.as_deref() != Ok("1"), "no {name} server: {why}");
        dormouse_testkit::skipped!("a test against a server of {name}, since there is none here: {why}");
        None
    }

    fn ask(&self, method: &str, path: &str) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let host = &self.address;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs `test`, which is called `name`, in a child whose cloud is at `address`.
fn as_child(cloud: &Cloud, name: &str, address: &str, test: fn(&Cloud)) {
    as_child_of(cloud, name, "1", address, test);
}

fn as_child_of(cloud: &Cloud, name: &str, role: &str, address: &str, test: fn(&Cloud)) {
    if std::env::var_os(ROLE).is_some() {
        return test(cloud);
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(ROLE, role)
        .envs((cloud.environment)(address))
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "the child ran another test: {said}");
}

pub fn with_server(cloud: &Cloud, name: &str, test: fn(&Cloud)) {
    if std::env::var_os(ROLE).is_some() {
        return test(cloud);
    }
    if let Some(server) = Server::start(cloud) {
        as_child(cloud, name, &server.address, test);
    }
}

/// Runs `test` with a server whose first write breaks, once before it arrives and once after.
pub fn with_a_break(cloud: &Cloud, name: &str, test: fn(&Cloud)) {
    if std::env::var_os(ROLE).is_some() {
        return test(cloud);
    }
    let Some(server) = Server::start(cloud) else { return };
    for (breaks, role) in [(proxy::Breaks::BeforeIt, "before"), (proxy::Breaks::AfterIt, "after")] {
        let (address, broken) = proxy::breaking(&server.address, breaks);
        // Each finds a place of its own.
        as_child_of(cloud, name, role, &address, test);
        assert!(broken.load(Ordering::SeqCst), "the first write broke");
    }
}

/// The same tests of every cloud.
macro_rules! tests_of {
    ($cloud:expr, $($name:ident),+ $(,)?) => {$(
        #[test]
        fn $name() {
            $crate::cloud::with_server(&$cloud, stringify!($name), $crate::cloud::$name);
        }
    )+};
}
pub(crate) use tests_of;

/// The same tests of what is no server at all.
macro_rules! tests_of_endpoints {
    ($cloud:expr, $($name:ident),+ $(,)?) => {$(
        #[test]
        fn $name() {
            $crate::cloud::$name(&$cloud);
        }
    )+};
}
pub(crate) use tests_of_endpoints;

pub fn snapshots_are_imported_exported_verified_and_removed(cloud: &Cloud) {
    let backend = open_url(cloud.url).unwrap();
    for key in [None, Some(3)] {
        let store = fresh(&backend, key);
        let mut machine = Machine::new(300, 40);
        machine.import(&store, "a", None).unwrap();
        let a = machine.remember();
        machine.change(1, 40);
        let report = machine.import(&store, "b", Some("a")).unwrap();
        assert!(report.new_bytes <= 41 * 4096, "{report:?}");
        for store in [&store, &fresh(&open_url(cloud.url).unwrap(), key)] {
            a.check(store, "a").unwrap();
            machine.remember().check(store, "b").unwrap();
            assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
            assert_eq!(store.list().unwrap().len(), 2);
            assert_eq!(store.usage().unwrap().snapshots.len(), 2);
        }
        // A name that was removed can be used again.
        let b = Name::new("b").unwrap();
        store.remove(&b).unwrap();
        assert!(matches!(store.remove(&b), Err(StoreError::NoSuchSnapshot { .. })));
        assert!(matches!(store.open_snapshot(&b), Err(StoreError::NoSuchSnapshot { .. })));
        assert_eq!(store.list().unwrap().len(), 1);
        machine.import(&store, "b", Some("a")).unwrap();
        machine.remember().check(&store, "b").unwrap();
        a.check(&store, "a").unwrap();
    }
    assert!(objects(&*backend).keys().all(|key| !key.contains("prefix")), "keys are within the prefix");
}

pub fn damaged_objects_are_named(cloud: &Cloud) {
    let backend = open_url(cloud.url).unwrap();
    let machine = Machine::new(60, 8);
    machine.import(&fresh(&backend, None), "a", None).unwrap();
    for (key, bytes) in objects(&*backend) {
        let mut flipped = bytes.to_vec();
        flipped[bytes.len() / 2] ^= 1;
        // Cut before any frame: every read begins past the end.
        for damaged in
            [Some(bytes.slice(..10)), Some(bytes.slice(..bytes.len() / 2)), Some(flipped.into()), None]
        {
            match damaged {
                Some(damaged) => backend.put_again(&key, damaged).unwrap(),
                // Names that were removed, and a store of a version before identities: nothing is wrong with either.
                None if key.contains("/refs/") || key.ends_with("/identity") => continue,
                None => backend.delete(&key).unwrap(),
            }
            let report = fresh(&backend, None).verify(None, VerifyDepth::Content, &NoProgress).unwrap();
            assert!(!report.is_clean() && report.damages.iter().all(|d| d.object == key), "{report:?}");
            match machine.remember().check(&fresh(&backend, None), "a") {
                Ok(()) => {}
                Err(StoreError::Damaged { key: k, .. } | StoreError::Missing { key: k, .. }) => {
                    assert_eq!(k, key);
                }
                Err(e) => panic!("{key}: {e:?}"),
            }
            backend.put_again(&key, bytes.clone()).unwrap();
        }
    }
}

pub fn of_concurrent_swaps_one_wins(cloud: &Cloud) {
    const WRITERS: usize = 8;
    let backend = open_url(cloud.url).unwrap();
    for round in 0..6 {
        let (_, version) = backend.get_versioned("plain/refs/x").unwrap();
        let start = Barrier::new(WRITERS);
        let won: usize = thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (backend, version, start) = (&backend, &version, &start);
                    scope.spawn(move || {
                        let bytes = Bytes::from(format!("{round}-{writer}"));
                        start.wait();
                        let won = backend.swap("plain/refs/x", version.as_ref(), bytes.clone()).unwrap();
                        let now = backend.get_versioned("plain/refs/x").unwrap().0.unwrap();
                        assert_eq!(won, now == bytes, "round {round}, writer {writer}");
                        usize::from(won)
                    })
                })
                .collect();
            writers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        assert_eq!(won, 1, "round {round}");
    }
    assert_eq!(backend.put_new("plain/x", Bytes::from_static(b"1")).unwrap(), PutOutcome::Created);
    assert_eq!(backend.put_new("plain/x", Bytes::from_static(b"2")).unwrap(), PutOutcome::Exists);
    assert_eq!(backend.get("plain/x", None).unwrap().unwrap(), "1");
}

pub fn concurrent_writers_of_one_name_win_one_after_the_other(cloud: &Cloud) {
    const WRITERS: u64 = 8;
    let backend = open_url(cloud.url).unwrap();
    Machine::new(20, 2).import(&fresh(&backend, None), "x", None).unwrap();
    let (start, wins) = (Barrier::new(WRITERS as usize), AtomicU64::new(0));
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (backend, start, wins) = (&backend, &start, &wins);
            scope.spawn(move || {
                let store = fresh(backend, None);
                let mut machine = Machine::new(20, 2);
                machine.rewrite_memory_pages(writer + 1, &[1, 2]);
                start.wait();
                for _ in 0..2 {
                    match machine.import(&store, "x", Some("x")) {
                        Ok(_) => wins.fetch_add(1, Ordering::SeqCst),
                        Err(StoreError::Conflict { .. }) => 0,
                        Err(e) => panic!("{e:?}"),
                    };
                }
            });
        }
    });
    let store = fresh(&backend, None);
    let sequence = store.open_snapshot(&Name::new("x").unwrap()).unwrap().reference().sequence;
    assert_eq!(sequence, 1 + wins.load(Ordering::SeqCst));
    assert!(sequence > 1);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

pub fn a_second_host_uploads_less_than_a_hundredth(cloud: &Cloud) {
    let machine = Machine::new(4_000, 400);
    let host = || {
        let counting = Arc::new(FaultyBackend::counting(open_url(cloud.url).unwrap()));
        (counting.clone(), Store::with_backend(counting, StoreOptions::default()))
    };
    let (first, store) = host();
    machine.import(&store, "a", None).unwrap();
    let (second, store) = host();
    let report = machine.import(&store, "b", None).unwrap();
    assert_eq!(report.new_bytes, 0);
    let (first, second) = (first.counts().take().put_bytes, second.counts().take().put_bytes);
    assert!(second * 100 < first, "{second} of {first} bytes");
}

pub fn a_bucket_that_is_not_there_is_an_error(cloud: &Cloud) {
    let backend = open_url(cloud.url_of_nothing).unwrap();
    backend.put_new("plain/x", Bytes::from_static(b"1")).unwrap_err();
    backend.put_again("plain/x", Bytes::from_static(b"1")).unwrap_err();
    let error = Machine::new(10, 2).import(&fresh(&backend, None), "a", None).unwrap_err();
    assert!(error.to_string().contains(cloud.no_such), "{error}");
}

pub fn what_nobody_needs_is_collected(cloud: &Cloud) {
    let backend = open_url(cloud.url).unwrap();
    let store = fresh(&backend, None);
    let mut machine = Machine::new(60, 8);
    machine.import(&store, "a", None).unwrap();
    machine.change(1, 20);
    machine.import(&store, "b", Some("a")).unwrap();
    store.repack(Default::default(), &NoProgress).unwrap();
    store.remove(&Name::new("a").unwrap()).unwrap();
    let at_once = GcOptions { grace: Duration::ZERO, dry_run: false };
    assert!(store.gc(at_once).unwrap().deleted_objects >= 4);
    machine.remember().check(&fresh(&backend, None), "b").unwrap();
    store.remove(&Name::new("b").unwrap()).unwrap();
    store.gc(at_once).unwrap();
    let left: Vec<_> = objects(&*backend).into_iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
    let is_tombstone = |bytes: &[u8]| {
        matches!(Named::decode(&dormouse_core::Domain::plain(), None, bytes), Ok(Named::Removed(_)))
    };
    let is_meant = |key: &str, bytes: &[u8]| key.ends_with("/identity") || is_tombstone(bytes);
    assert!(
        left.iter().all(|(key, bytes)| is_meant(key, bytes)),
        "only identity and tombstones stay: {left:?}"
    );
}

/// An endpoint that answers every request with `answer`, or, without one, hangs up. Counts connections.
fn endpoint(answer: Option<&'static str>) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let requests = Arc::new(AtomicU64::new(0));
    let counter = requests.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            if let Some(answer) = answer {
                let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
                while head.next().is_some_and(|l| l.is_ok_and(|l| !l.is_empty())) {}
                let _ = write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        }
    });
    (address, requests)
}

fn put_new_is_done(cloud: &Cloud) {
    let key = format!("plain/packs/{}", std::env::var(ROLE).unwrap());
    let (backend, bytes) = (open_url(cloud.url).unwrap(), Bytes::from_static(b"a pack"));
    // Written by the first attempt or by the second: who asked cannot tell, and need not.
    backend.put_new(&key, bytes.clone()).unwrap();
    assert_eq!(backend.get(&key, None).unwrap(), Some(bytes));
}

pub fn a_new_object_is_written_though_the_connection_breaks(cloud: &Cloud) {
    with_a_break(cloud, "a_new_object_is_written_though_the_connection_breaks", put_new_is_done);
}

fn swap_is_done(cloud: &Cloud) {
    let key = format!("plain/refs/{}", std::env::var(ROLE).unwrap());
    let (backend, bytes) = (open_url(cloud.url).unwrap(), Bytes::from_static(b"a reference"));
    assert!(backend.swap(&key, None, bytes.clone()).unwrap());
    assert_eq!(backend.get_versioned(&key).unwrap().0, Some(bytes));
    assert!(!backend.swap(&key, None, Bytes::from_static(b"another")).unwrap());
}

pub fn a_name_is_moved_though_the_connection_breaks(cloud: &Cloud) {
    with_a_break(cloud, "a_name_is_moved_though_the_connection_breaks", swap_is_done);
}

fn import_is_unavailable(cloud: &Cloud) {
    let store = fresh(&open_url(cloud.url).unwrap(), None);
    let error = Machine::new(10, 2).import(&store, "a", None).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains(cloud.url), "{error}");
}

/// Requests that `test` made to an endpoint that gives this answer; `None` in the child.
fn requests_to(cloud: &Cloud, name: &str, answer: Option<&'static str>, test: fn(&Cloud)) -> Option<u64> {
    let (address, requests) = endpoint(answer);
    as_child(cloud, name, &address, test);
    std::env::var_os(ROLE).is_none().then(|| requests.load(Ordering::SeqCst))
}

pub fn an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts(cloud: &Cloud) {
    let name = "an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts";
    let requests = requests_to(cloud, name, None, import_is_unavailable);
    assert!(requests.is_none_or(|r| (2..=10).contains(&r)), "{requests:?} attempts");
}

pub fn an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts(cloud: &Cloud) {
    let name = "an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts";
    let requests = requests_to(cloud, name, Some("503 Slow Down"), import_is_unavailable);
    assert!(requests.is_none_or(|r| (2..=10).contains(&r)), "{requests:?} attempts");
}

pub fn an_endpoint_that_does_not_listen_is_unavailable(cloud: &Cloud) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    as_child(cloud, "an_endpoint_that_does_not_listen_is_unavailable", &address, import_is_unavailable);
}

pub fn refused_credentials_are_denied(cloud: &Cloud) {
    let test = |cloud: &Cloud| {
        let store = fresh(&open_url(cloud.url).unwrap(), None);
        let error = Machine::new(10, 2).import(&store, "a", None).unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
    };
    let requests = requests_to(cloud, "refused_credentials_are_denied", Some("403 Forbidden"), test);
    assert!(requests.is_none_or(|r| r == 1), "a refusal is not tried again: {requests:?}");
}
