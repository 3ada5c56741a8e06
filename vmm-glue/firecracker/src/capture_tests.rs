use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::api::{ApiClient, ApiError, SnapshotKind};
use super::super::capture_files::CaptureFiles;
use super::super::memfile::{MemFile, holes_are_exact};
use super::super::tracking::{Base, Tracking};
use super::{CaptureError, capture};
use dormouse_vmm_common::vmm_process::VmmProcess;

#[test]
fn a_memory_file_is_opened_by_its_path() {
    let file = MemFile::holding("test", b"state").expect("memfd");
    assert_eq!(std::fs::read(file.path()).expect("read"), b"state");
    std::fs::write(file.path(), b"other").expect("write");
    assert_eq!((file.read().expect("read"), file.len().expect("length")), (b"other".to_vec(), 5));
    // Whatever the answer is here, asking must not fail.
    eprintln!("holes of memory files are exact: {}", holes_are_exact());
}

#[test]
fn a_base_is_remembered_until_it_is_forgotten_and_only_in_a_directory_of_ones_own() {
    let directory = tempfile::tempdir().expect("directory");
    let tracking = Tracking::open(&directory.path().join("run")).expect("open");
    let (near, _far) = UnixStream::pair().expect("pair");
    let process = VmmProcess::of(&near).expect("this process");
    assert_eq!(tracking.base_of(&process), None);
    let base = Base { name: "vm".into(), snapshot: "00ff".into() };
    tracking.remember(&process, &base).expect("remember");
    assert_eq!(tracking.base_of(&process), Some(base));
    tracking.forget(&process).expect("forget");
    tracking.forget(&process).expect("nothing to forget");
    assert_eq!(tracking.base_of(&process), None);

    let open = directory.path().join("open");
    std::fs::create_dir(&open).expect("directory");
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&open, everybody).expect("mode");
    Tracking::open(&open).expect_err("anybody could write there");
}

/// A Firecracker whose guest runs, and which answers a pause, a snapshot and a resume by `answers`, or hangs up without
/// a word; what it was asked for besides its state, in order, until nobody asks any more.
fn firecracker(
    socket: &Path,
    answers: [(&'static str, Option<&'static str>); 3],
) -> JoinHandle<Vec<&'static str>> {
    let listener = UnixListener::bind(socket).expect("bind");
    std::thread::spawn(move || {
        let mut asked = Vec::new();
        loop {
            let (mut client, _) = listener.accept().expect("accept");
            let (mut request, mut buffer) = (String::new(), [0; 4096]);
            while !request.ends_with(['}', '\n']) {
                let read = client.read(&mut buffer).expect("read");
                request += std::str::from_utf8(&buffer[..read]).expect("a request");
            }
            if request.starts_with("STOP") {
                return asked;
            }
            let known = answers.iter().find(|(what, _)| request.contains(what));
            let answer = match known {
                Some((what, answer)) => {
                    asked.push(*what);
                    *answer
                }
                None => Some("HTTP/1.1 200 \r\nContent-Length: 19\r\n\r\n{\"state\":\"Running\"}"),
            };
            client.write_all(answer.unwrap_or_default().as_bytes()).expect("write");
        }
    })
}

const FINE: Option<&str> = Some("HTTP/1.1 204 \r\n\r\n");
const REFUSED: Option<&str> =
    Some("HTTP/1.1 400 \r\nContent-Length: 26\r\n\r\n{\"fault_message\":\"but no\"}");

/// What fails after the guest may stand still does not leave it so; and what failed first is what is told, whether or
/// not the guest could go on.
#[test]
fn a_guest_whose_pause_or_snapshot_failed_goes_on_and_the_first_error_is_told() {
    let cases = [
        (REFUSED, FINE, FINE, vec!["Paused", "Resumed"], "PATCH /vm"),
        (None, FINE, FINE, vec!["Paused", "Resumed"], "PATCH /vm"),
        (None, FINE, REFUSED, vec!["Paused", "Resumed"], "PATCH /vm"),
        (FINE, REFUSED, REFUSED, vec!["Paused", "snapshot_path", "Resumed"], "PUT /snapshot/create"),
    ];
    for (pause, snapshot, resume, expected, failed) in cases {
        let directory = tempfile::tempdir().expect("directory");
        let socket = directory.path().join("api");
        let answers = [("Paused", pause), ("snapshot_path", snapshot), ("Resumed", resume)];
        let served = firecracker(&socket, answers);
        let api = ApiClient::new(&socket, Duration::from_secs(60));
        let files = CaptureFiles {
            memory: MemFile::new("memory").expect("memfd"),
            state: MemFile::new("state").expect("memfd"),
        };
        let error = capture(&api, SnapshotKind::Full, false, true, files).expect_err("refused");
        UnixStream::connect(&socket).and_then(|mut s| s.write_all(b"STOP\n")).expect("stop");
        assert_eq!(served.join().expect("no panic"), expected, "{error}");
        match error {
            CaptureError::Api(error) if resume == FINE => {
                let lost = matches!(error, ApiError::Response { .. } | ApiError::Io { .. });
                assert!(error.to_string().contains(failed) && lost == pause.is_none(), "{error}");
            }
            CaptureError::StandsStill { why, .. } if resume == REFUSED => {
                assert!(why.contains(failed), "{why}")
            }
            other => panic!("{other}"),
        }
    }
}
