use std::os::unix::net::UnixStream;

use super::*;

struct Host {
    tracking: Tracking,
    process: VmmProcess,
    _sockets: (UnixStream, UnixStream),
    directory: tempfile::TempDir,
}

/// A host, and a process on it: this one.
fn host() -> Host {
    let directory = tempfile::tempdir().expect("directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).expect("mode");
    let sockets = UnixStream::pair().expect("pair");
    let process = VmmProcess::of(&sockets.0).expect("this process");
    Host { tracking: Tracking::open(directory.path()).expect("open"), process, _sockets: sockets, directory }
}

fn note(name: &str) -> StandbyNote {
    StandbyNote::new(&Name::new(name).expect("name"), Path::new("/run/vm.sock"), true)
}

#[test]
fn a_standby_is_left_behind_only_once_nobody_does_it() {
    let host = host();
    let (tracking, process) = (&host.tracking, &host.process);
    assert!(tracking.standby_left(process).is_none());
    let (mut under_way, earlier) = tracking.begin_standby(process, &note("one")).expect("begun");
    assert!(earlier.is_none());
    // Held by a descriptor of this process, as by another process.
    assert!(tracking.standby_left(process).is_none());
    let busy = tracking.begin_standby(process, &note("two")).expect_err("under way");
    assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
    under_way.note(&note("still-one")).expect("noted");
    assert!(tracking.standby_left(process).is_none() && tracking.all_standbys_left().is_empty());
    assert!(under_way.is_of(process, tracking));

    // As a process that is killed leaves it.
    drop(under_way);
    let (taken, left) = tracking.standby_left(process).expect("left behind");
    assert_eq!(left.name, "still-one");
    assert!(tracking.standby_left(process).is_none(), "one finishes it");
    drop(taken);
    // Whoever begins another one learns of it, and it stays noted until then.
    let (begun, earlier) = tracking.begin_standby(process, &note("next")).expect("begun");
    assert_eq!(earlier.expect("left behind").name, "still-one");
    drop(begun);
    assert_eq!(tracking.standby_left(process).expect("left behind").1.name, "still-one");
    let mut all = tracking.all_standbys_left();
    assert_eq!(all.len(), 1);
    all.remove(0).0.done();
    assert!(tracking.standby_left(process).is_none());
    assert_eq!(fs::read_dir(host.directory.path()).expect("list").count(), 0);
}

#[test]
fn a_note_of_nonsense_or_of_another_version_is_none() {
    let host = host();
    let path = host.tracking.standby_path(&host.process).expect("path");
    for nonsense in ["", "{}", "{\"version\":2}"] {
        fs::write(&path, nonsense).expect("written");
        assert!(host.tracking.standby_left(&host.process).is_none());
    }
    // It is in nobody's way.
    host.tracking.begin_standby(&host.process, &note("one")).expect("begun").0.done();
    assert!(!path.exists());
}

/// Each had looked, and put its own in the place of the other's.
#[test]
fn of_two_that_find_no_note_one_begins() {
    let host = host();
    let path = host.tracking.standby_path(&host.process).expect("path");
    assert!(hold(&path).expect("none").is_none() && hold(&path).expect("none").is_none());
    let first = begin(&path, &note("one")).expect("begun");
    let second = begin(&path, &note("two")).expect_err("the other's");
    assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
    assert!(host.tracking.standby_left(&host.process).is_none(), "the first holds it");
    drop(first);
    assert_eq!(host.tracking.standby_left(&host.process).expect("left behind").1.name, "one");
    assert_eq!(fs::read_dir(host.directory.path()).expect("list").count(), 1);
}
