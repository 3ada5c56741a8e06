//! The store on S3, against a real server that speaks the protocol.
//!
//! The server is `moto_server`: at the path in `DORMOUSE_MOTO`, or on `PATH`. Where there is none the tests say that
//! they skip themselves, and with `DORMOUSE_REQUIRE_S3=1` they fail instead.
//!
//! Endpoint and credentials come from the environment, which a process cannot safely change for itself: each test
//! starts the server and runs itself again, as a child with the environment set.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use bytes::Bytes;
use common::{Machine, fresh, objects};
use dormouse_chunkstore::{
    NoProgress, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{PutOutcome, faulty::FaultyBackend, open_url},
};
use dormouse_core::Name;

const URL: &str = "s3://bucket/some/prefix";
/// Set in the child.
const ROLE: &str = "DORMOUSE_TEST_S3_CHILD";

/// A server, until it is dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start() -> Option<Self> {
        let program = std::env::var("DORMOUSE_MOTO").unwrap_or_else(|_| "moto_server".into());
        let started = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = match started {
            Ok(process) => process,
            Err(e) => return Self::skip(&format!("{program}: {e}")),
        };
        let mut said = String::new();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        while let Some(Ok(line)) = lines.next() {
            if let Some((_, address)) = line.split_once("http://") {
                let server = Server { process, address: address.trim().to_owned() };
                // Nobody reads what it says from here on, but it must be able to say it.
                thread::spawn(move || lines.for_each(drop));
                server.ask("PUT", "/bucket");
                return Some(server);
            }
            said.push_str(&line);
        }
        let _ = process.wait();
        Self::skip(&format!("{program} ended: {said}"))
    }

    fn skip(why: &str) -> Option<Self> {
        assert!(std::env::var("DORMOUSE_REQUIRE_S3").as_deref() != Ok("1"), "no S3 server: {why}");
        eprintln!("SKIPPED: a test against an S3 server, since there is none here: {why}");
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
        assert!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs `test` in a child whose S3 is at `address`.
fn as_child(name: &str, address: &str, test: fn()) {
    if std::env::var_os(ROLE).is_some() {
        return test();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(ROLE, "1")
        .env("AWS_ENDPOINT", format!("http://{address}"))
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_REGION", "us-east-1")
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "the child ran another test: {said}");
}

fn with_server(name: &str, test: fn()) {
    if std::env::var_os(ROLE).is_some() {
        return test();
    }
    if let Some(server) = Server::start() {
        as_child(name, &server.address, test);
    }
}

#[test]
fn snapshots_are_imported_exported_verified_and_removed() {
    with_server("snapshots_are_imported_exported_verified_and_removed", || {
        let backend = open_url(URL).unwrap();
        for key in [None, Some(3)] {
            let store = fresh(&backend, key);
            let mut machine = Machine::new(300, 40);
            machine.import(&store, "a", None).unwrap();
            let a = machine.remember();
            machine.change(1, 40);
            let report = machine.import(&store, "b", Some("a")).unwrap();
            assert!(report.new_bytes <= 41 * 4096, "{report:?}");
            for store in [&store, &fresh(&open_url(URL).unwrap(), key)] {
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
    });
}

#[test]
fn damaged_objects_are_named() {
    with_server("damaged_objects_are_named", || {
        let backend = open_url(URL).unwrap();
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
                    None if key.contains("/refs/") => continue,
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
    });
}

#[test]
fn of_concurrent_swaps_one_wins() {
    with_server("of_concurrent_swaps_one_wins", || {
        const WRITERS: usize = 8;
        let backend = open_url(URL).unwrap();
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
    });
}

#[test]
fn concurrent_writers_of_one_name_win_one_after_the_other() {
    with_server("concurrent_writers_of_one_name_win_one_after_the_other", || {
        const WRITERS: u64 = 8;
        let backend = open_url(URL).unwrap();
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
    });
}

#[test]
fn a_second_host_uploads_less_than_a_hundredth() {
    with_server("a_second_host_uploads_less_than_a_hundredth", || {
        let machine = Machine::new(4_000, 400);
        let host = || {
            let counting = Arc::new(FaultyBackend::counting(open_url(URL).unwrap()));
            (counting.clone(), Store::with_backend(counting, StoreOptions::default()))
        };
        let (first, store) = host();
        machine.import(&store, "a", None).unwrap();
        let (second, store) = host();
        let report = machine.import(&store, "b", None).unwrap();
        assert_eq!(report.new_bytes, 0);
        let (first, second) = (first.counts().take().put_bytes, second.counts().take().put_bytes);
        assert!(second * 100 < first, "{second} of {first} bytes");
    });
}

#[test]
fn a_bucket_that_is_not_there_is_an_error() {
    with_server("a_bucket_that_is_not_there_is_an_error", || {
        let backend = open_url("s3://nobody-made-this/prefix").unwrap();
        backend.put_new("plain/x", Bytes::from_static(b"1")).unwrap_err();
        backend.put_again("plain/x", Bytes::from_static(b"1")).unwrap_err();
        let error = Machine::new(10, 2).import(&fresh(&backend, None), "a", None).unwrap_err();
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    });
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

fn import_is_unavailable() {
    let error = Machine::new(10, 2).import(&fresh(&open_url(URL).unwrap(), None), "a", None).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains("s3://bucket"), "{error}");
}

#[test]
fn an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts() {
    let (address, requests) = endpoint(None);
    as_child("an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts", &address, import_is_unavailable);
    let inside = std::env::var_os(ROLE).is_some();
    let requests = requests.load(Ordering::SeqCst);
    assert!(inside || (2..=10).contains(&requests), "{requests} attempts");
}

#[test]
fn an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts() {
    let (address, requests) = endpoint(Some("503 Slow Down"));
    as_child(
        "an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts",
        &address,
        import_is_unavailable,
    );
    let inside = std::env::var_os(ROLE).is_some();
    let requests = requests.load(Ordering::SeqCst);
    assert!(inside || (2..=10).contains(&requests), "{requests} attempts");
}

#[test]
fn an_endpoint_that_does_not_listen_is_unavailable() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    as_child("an_endpoint_that_does_not_listen_is_unavailable", &address, import_is_unavailable);
}

#[test]
fn refused_credentials_are_denied() {
    let (address, requests) = endpoint(Some("403 Forbidden"));
    as_child("refused_credentials_are_denied", &address, || {
        let error = Machine::new(10, 2).import(&fresh(&open_url(URL).unwrap(), None), "a", None).unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
    });
    let requests = requests.load(Ordering::SeqCst);
    assert!(requests <= 1, "a refusal is not tried again");
}
