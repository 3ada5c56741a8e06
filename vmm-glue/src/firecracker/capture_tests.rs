use std::os::unix::net::UnixStream;

use super::super::memfile::{MemFile, holes_are_exact};
use super::super::tracking::{Base, Tracking};
use super::super::vmm_process::VmmProcess;

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
