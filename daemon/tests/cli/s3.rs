//! The same commands over a server that speaks the S3 protocol, where `DORMOUSE_MOTO` names one.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
};

use crate::home::{Home, Ran, image};

/// A server of our own, ended with the test.
struct Server {
    process: Child,
    port: u16,
}

impl Server {
    /// `None`, said loudly, where there is no server to start.
    fn start() -> Option<Server> {
        let Some(program) = std::env::var_os("DORMOUSE_MOTO") else {
            let required = std::env::var("DORMOUSE_REQUIRE_S3").is_ok_and(|v| v == "1");
            assert!(!required, "DORMOUSE_REQUIRE_S3 is set, but DORMOUSE_MOTO names no server");
            dormouse_testkit::skipped!(
                "DORMOUSE_MOTO does not name a moto_server; scripts/fetch-test-parts fetches one"
            );
            return None;
        };
        // Another process may take the port before the server does: then the server ends, and so does the wait.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Server { process, port };
        while server.connect().is_none() {
            assert!(server.process.try_wait().unwrap().is_none(), "the server ended before it listened");
            std::thread::yield_now();
        }
        Some(server)
    }

    fn connect(&self) -> Option<TcpStream> {
        TcpStream::connect(("127.0.0.1", self.port)).ok()
    }

    fn make_bucket(&self, name: &str) {
        let mut stream = self.connect().unwrap();
        write!(
            stream,
            "PUT /{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    fn command(&self, home: &Home, args: &[&str]) -> Command {
        let mut command = home.command(args);
        command.args(["--store", "s3://sleepers/some/prefix", "--json"]);
        command.env("AWS_ENDPOINT", format!("http://127.0.0.1:{}", self.port)).env("AWS_ALLOW_HTTP", "true");
        command.envs([
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
        ]);
        command
    }

    fn run(&self, home: &Home, args: &[&str]) -> Ran {
        Ran::of(self.command(home, args).output().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn snapshots_live_in_s3_and_two_hosts_share_them() {
    let Some(server) = Server::start() else { return };
    server.make_bucket("sleepers");
    let (here, there) = (Home::new(), Home::new());
    let memory = image(1, 5000, 100);
    for home in [&here, &there] {
        fs::write(home.path("m"), &memory).unwrap();
    }
    let done = |home: &Home, args: &[&str]| {
        let ran = server.run(home, args);
        assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.stdout, ran.stderr);
        ran.document()
    };
    let first = done(&here, &["import", "a", "--memory", "m"]);
    let second = done(&there, &["import", "b", "--memory", "m"]);
    assert_eq!(second["new_bytes"], 0, "the other host has found what this one stored");
    let (stored, again) = (first["stored_bytes"].as_u64().unwrap(), second["stored_bytes"].as_u64().unwrap());
    assert!(again * 100 < stored, "{again} of {stored} bytes were uploaded again");
    done(&there, &["export", "a", "--memory", "copy"]);
    assert!(fs::read(there.path("copy")).unwrap() == memory);
    assert_eq!(server.run(&here, &["import", "b", "--memory", "m"]).code, 1, "the name is taken there too");
    done(&here, &["rm", "b"]);
    assert_eq!(server.run(&there, &["show", "b"]).document()["error"]["kind"], "no_such_snapshot");
    done(&here, &["repack"]);
    done(&here, &["gc", "--grace", "0s"]);
    assert_eq!(done(&there, &["verify"])["clean"], true);
    done(&there, &["export", "a", "--memory", "copy"]);
    assert!(fs::read(there.path("copy")).unwrap() == memory);
}

#[test]
fn streams_are_brought_to_a_host_and_taken_off_it() {
    let Some(server) = Server::start() else { return };
    server.make_bucket("sleepers");
    let (here, there) = (Home::new(), Home::new());
    fs::write(here.path("m"), image(1, 2000, 100)).unwrap();
    fs::write(here.path("s"), b"state").unwrap();
    let done = |home: &Home, args: &[&str]| {
        let ran = server.run(home, args);
        assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.stdout, ran.stderr);
        ran.document()
    };
    done(&here, &["import", "a", "--memory", "m", "--state", "vm=s"]);
    let tier = |home: &Home| done(home, &["ls"])["snapshots"][0]["tier"].as_str().unwrap().to_owned();
    let none = server.run(&there, &["warm", "a"]);
    assert_eq!((none.code, &none.document()["error"]["kind"]), (1, &"no_such_part".into()));
    let record = r#"{"version": 1, "name": "a", "snapshot": "", "recorded_unix_ms": 0, "window_ms": 0,
                    "complete": true, "session": {"missed": [[100, 500], [1, 4], [99999, 5]]}}"#;
    fs::write(here.path("record"), record).unwrap();
    let built = done(&here, &["stream", "rebuild", "a", "--from-record", "record"]);
    assert_eq!(built["stream"]["pages"], 504, "what is not there is left out: {built}");
    assert_eq!((tier(&here), tier(&there)), ("warm".into(), "cold".into()));
    let warm = done(&there, &["warm", "a"]);
    assert_eq!((&warm["tier"], &warm["pinned"]), (&"warm".into(), &true.into()));
    assert_eq!(warm["stored_bytes"], built["stream"]["stored_bytes"]);
    let shown = done(&there, &["show", "a"]);
    assert_eq!((&shown["pinned"], &shown["stream"]["current"]), (&true.into(), &true.into()), "{shown}");
    // Another generation of the name: what is here is of no use any more.
    fs::write(there.path("m"), image(2, 2000, 100)).unwrap();
    done(&there, &["import", "a", "--memory", "m", "--replace"]);
    assert_eq!(tier(&there), "cold");
    let shown = done(&there, &["show", "a"]);
    assert_eq!(shown["stream"]["current"], false, "{shown}");
    let built = done(&there, &["stream", "rebuild", "a"]);
    assert_eq!((&built["from"], &built["stream"]["pages"]), (&"stream".into(), &504.into()), "{built}");
    assert_eq!(tier(&there), "warm");
    assert_eq!(done(&there, &["cool", "a"])["tier"], "cold");
    assert_eq!(done(&there, &["stream", "rm", "a"])["removed"], true);
    assert_eq!(done(&there, &["show", "a"])["stream"], serde_json::Value::Null);
}

/// Kills the daemon if its test fails.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_daemon_serves_an_encrypted_store_in_s3_from_start_to_end() {
    let Some(server) = Server::start() else { return };
    server.make_bucket("sleepers");
    let home = Home::new();
    fs::write(home.path("m"), image(1, 50, 10)).unwrap();
    let done = |args: &[&str]| {
        let ran = server.run(&home, args);
        assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.stdout, ran.stderr);
        ran.document()
    };
    done(&["key", "generate", "--out", "k"]);
    done(&["import", "a", "--memory", "m", "--key-file", "k"]);
    let mut command = server.command(&home, &["serve", "--control", "control", "--key-file", "k"]);
    let mut daemon = Daemon(command.stdout(Stdio::piped()).spawn().unwrap());
    let said = serde_json::Deserializer::from_reader(daemon.0.stdout.take().unwrap());
    let serving: serde_json::Value = said.into_iter().next().expect("it begins to serve").unwrap();
    let mut stream = UnixStream::connect(serving["control"].as_str().unwrap()).unwrap();
    write!(stream, "GET /v1/snapshots HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"name\":\"a\""), "{answer}");
    let asked = Command::new("kill").arg(daemon.0.id().to_string()).status().unwrap();
    assert!(asked.success());
    assert!(daemon.0.wait().unwrap().success(), "it lets go of the store and ends");
}

#[test]
fn a_server_that_is_not_there_is_unavailable_and_can_be_tried_again() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 5, 0)).unwrap();
    let mut command = home.command(&["ls", "--json", "--store", "s3://sleepers"]);
    // Nothing listens on a port that was just given back.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    command.env("AWS_ENDPOINT", format!("http://127.0.0.1:{port}")).env("AWS_ALLOW_HTTP", "true");
    command.envs([
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ]);
    let ran = Ran::of(command.output().unwrap());
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    let error = ran.document()["error"].take();
    assert_eq!(error["kind"], "unavailable", "{error}");
    assert_eq!(error["retryable"], true);
}
