use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use clap::Parser;
use dormouse_chunkstore::{ImageSource, ImportRequest, NoProgress, StoreOptions};
use dormouse_core::{ImageId, ImageKind};
use dormouse_firecracker::tracking::Base;
use serde_json::{Value, json};

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    standby: StandbyArgs,
}

/// A Firecracker as far as it is asked before a capture, and all that a choice is made by.
struct Scene {
    directory: tempfile::TempDir,
    store: Store,
    tracking: Tracking,
    process: VmmProcess,
    _connection: UnixStream,
}

const MEMORY_MIB: u64 = 8;

fn answer(mut client: UnixStream, answers: &[(&'static str, Value)]) {
    let (mut request, mut buffer) = (String::new(), [0; 4096]);
    while !request.ends_with("\r\n\r\n") {
        match client.read(&mut buffer) {
            Ok(read @ 1..) => request += std::str::from_utf8(&buffer[..read]).expect("a request"),
            _ => return,
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let known = answers.iter().find(|(known, _)| *known == path);
    let (status, body) = match known {
        Some((_, body)) => (200, body.to_string()),
        None => (400, json!({"fault_message": "no such thing"}).to_string()),
    };
    let length = body.len();
    let _ = write!(client, "HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{body}");
}

/// One whose guest this host knows to have come from the snapshot `p`. Each answer is of a path.
fn scene(answers: Vec<(&'static str, Value)>) -> Scene {
    let directory = tempfile::tempdir().expect("directory");
    let listener = UnixListener::bind(directory.path().join("api")).expect("bind");
    let connection = UnixStream::connect(directory.path().join("api")).expect("connect");
    let process = VmmProcess::of(&connection).expect("this process");
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let answers = answers.clone();
            std::thread::spawn(move || answer(client, &answers));
        }
    });
    let private = PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(directory.path(), private).expect("mode");
    let tracking = Tracking::open(directory.path()).expect("tracking");
    let url = directory.path().join("store");
    let store = Store::open(url.to_str().expect("text"), StoreOptions::default()).expect("store");
    let image = directory.path().join("image");
    std::fs::write(&image, vec![7; 4096]).expect("image");
    let request = ImportRequest {
        images: vec![ImageSource {
            id: ImageId::new("memory").expect("id"),
            kind: ImageKind::Memory,
            path: image,
            dirty: None,
        }],
        ..ImportRequest::new(Name::new("p").expect("name"))
    };
    let snapshot = store.import(&request, &NoProgress).expect("imported").snapshot;
    tracking.remember(&process, &Base { name: "p".into(), snapshot }).expect("remembered");
    Scene { directory, store, tracking, process, _connection: connection }
}

fn answers(version: &str, drives: Value) -> Vec<(&'static str, Value)> {
    vec![
        ("/", json!({"state": "Running", "vmm_version": version})),
        ("/machine-config", json!({"mem_size_mib": MEMORY_MIB, "track_dirty_pages": true})),
        ("/vm/config", json!({"drives": drives})),
    ]
}

impl Scene {
    fn choose(&self) -> Result<Choice, Failure> {
        let socket = self.directory.path().join("api");
        let socket = socket.to_str().expect("text");
        let line = Line::parse_from(["standby", "n", "--api-socket", socket]);
        let api = ApiClient::new(&line.standby.api_socket, Duration::from_secs(60));
        choose(&line.standby, &api, &self.process, None, &self.tracking, &self.store)
            .map(|(choice, _)| choice)
    }
}

#[test]
fn drives_that_snapshots_leave_out_are_refused() {
    let file = json!({"drive_id": "root", "path_on_host": "/disk", "socket": null, "io_engine": "Async"});
    let served = json!({"drive_id": "data", "path_on_host": null, "socket": "/run/data.sock"});
    let refused = scene(answers("1.12.1", json!([file, served]))).choose().expect_err("it would be lost");
    assert!(refused.message.contains("the drive data (vhost-user)"), "{refused}");
    scene(answers("1.12.1", json!([file]))).choose().expect("files are named in the snapshot");
}

#[test]
fn differences_that_firecracker_misplaces_are_not_taken() {
    if !memfile::holes_are_exact() {
        dormouse_testkit::skipped!("files in memory have no exact holes here");
        return;
    }
    let pluggable = |version| {
        let mut answers = answers(version, json!([]));
        answers.push(("/hotplug/memory", json!({"total_size_mib": MEMORY_MIB})));
        scene(answers).choose().expect("chosen")
    };
    let misplaced = pluggable("1.14.1");
    assert_eq!(misplaced.kind, SnapshotKind::Full);
    let because = misplaced.full_because.unwrap_or_default();
    assert!(because.contains("1.14.1") && because.contains("wrong offsets"), "{because}");
    assert_eq!((pluggable("1.14.2").kind, pluggable("1.14.2").full_because), (SnapshotKind::Diff, None));
    let one_slot = scene(answers("1.14.1", json!([]))).choose().expect("chosen");
    assert_eq!((one_slot.kind, one_slot.full_because), (SnapshotKind::Diff, None));
}
