//! Files that are written to while they are imported, and files that are none.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs::{self, File, FileTimes},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
};

use common::{Machine, assert_same, store_in};
use dormouse_chunkstore::{BlobBytes, Dirty, NoProgress, Progress, Store, StoreError};
use dormouse_core::{ImageKind, Name};

/// Does something to a file once all files are open and before the first is read.
struct Meanwhile<F>(F);

impl<F: Fn() + Send + Sync> Progress for Meanwhile<F> {
    fn begin(&self, _total_bytes: u64) {
        (self.0)();
    }
}

fn write(path: &Path, offset: u64) {
    File::options().write(true).open(path).unwrap().write_all_at(&[7; 4096], offset).unwrap();
}

/// How an import of a machine is refused to whose memory `change` is done meanwhile.
fn refused(change: impl Fn(&Path) + Send + Sync) -> String {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(600, 10);
    let memory = machine.path("memory");
    let error = store.import(&machine.request("a", None), &Meanwhile(|| change(&memory))).unwrap_err();
    assert!(matches!(error, StoreError::Changed { .. }), "{error:?}");
    assert!(!error.is_retryable());
    assert!(store.list().unwrap_or_default().is_empty(), "nothing is stored");
    again(&machine, &store);
    error.to_string()
}

/// Once nobody writes to the files any more they can be imported, unless they are gone.
fn again(machine: &Machine, store: &Store) {
    if let Err(e) = machine.import(store, "a", None) {
        assert!(matches!(e, StoreError::File { .. }) && !machine.path("memory").exists(), "{e}");
    }
}

#[test]
fn a_file_cut_off_while_it_is_read_is_refused() {
    let all = refused(|file| File::options().write(true).open(file).unwrap().set_len(0).unwrap());
    assert!(all.contains("changed while it was imported"), "{all}");
    assert!(all.contains("nothing was stored"), "{all}");
    refused(|file| File::options().write(true).open(file).unwrap().set_len(300 * 4096 + 5).unwrap());
}

#[test]
fn a_file_written_to_in_place_while_it_is_read_is_refused() {
    let why = refused(|file| write(file, 8192));
    assert!(why.contains("it was written to"), "{why}");
    // Whoever turns the clock of the file back is found out as well.
    refused(|file| {
        let before = fs::metadata(file).unwrap().modified().unwrap();
        write(file, 8192);
        let times = FileTimes::new().set_modified(before);
        File::options().write(true).open(file).unwrap().set_times(times).unwrap();
    });
}

#[test]
fn a_file_that_grows_while_it_is_read_is_refused() {
    let why = refused(|file| write(file, fs::metadata(file).unwrap().len()));
    assert!(why.contains("and now has"), "{why}");
}

#[test]
fn a_file_replaced_or_removed_while_it_is_read_is_refused() {
    refused(|file| {
        let other = file.with_extension("other");
        fs::copy(file, &other).unwrap();
        fs::rename(other, file).unwrap();
    });
    refused(|file| fs::remove_file(file).unwrap());
}

#[test]
fn a_changing_file_is_stored_if_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(600, 10);
    let (memory, kept) = (machine.path("memory"), machine.path("kept"));
    fs::copy(&memory, &kept).unwrap();
    let mut request = machine.request("a", None);
    request.allow_changing = true;
    let size = fs::metadata(&memory).unwrap().len();
    let cut = || File::options().write(true).open(&memory).unwrap().set_len(100 * 4096 + 5).unwrap();
    store.import(&request, &Meanwhile(cut)).unwrap();
    let image = store.open_snapshot(&Name::new("a").unwrap()).unwrap();
    let copy = dir.path().join("copy");
    image.image(ImageKind::Memory, "memory").unwrap().export(&copy, &NoProgress).unwrap();
    // As long as it was, with zeros where there was nothing any more.
    let expected = File::options().write(true).open(&kept).unwrap();
    expected.set_len(100 * 4096 + 5).unwrap();
    expected.set_len(size).unwrap();
    assert_same(&copy, &kept);
}

#[test]
fn what_has_no_length_is_refused_without_waiting_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(10, 10);
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let none = [
        ("/dev/zero".into(), "a character device"),
        (fifo, "a pipe"),
        (dir.path().join("socket"), "a socket"),
        (dir.path().to_owned(), "a directory"),
    ];
    for (path, what) in none {
        let mut as_image = machine.request("a", None);
        as_image.images[0].path.clone_from(&path);
        let mut as_state = machine.request("a", None);
        as_state.blobs[0].bytes = BlobBytes::File(path);
        for request in [as_image, as_state] {
            let error = store.import(&request, &NoProgress).unwrap_err();
            assert!(matches!(error, StoreError::Usage(_)), "{error:?}");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
    assert!(store.list().unwrap_or_default().is_empty());
}

/// A ramfs of our own, until it is dropped: it knows no holes, and says that all of a file is data.
struct RamFs(tempfile::TempDir);

impl RamFs {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(dir.path()).output();
        if mount.as_ref().is_ok_and(|done| done.status.success()) {
            return Some(RamFs(dir));
        }
        assert!(std::env::var("DORMOUSE_REQUIRE_MOUNT").as_deref() != Ok("1"), "no ramfs: {mount:?}");
        dormouse_testkit::skipped!("a test on a ramfs, since none can be mounted here");
        None
    }
}

impl Drop for RamFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_diff_on_a_file_system_without_holes_is_refused() {
    let Some(ramfs) = RamFs::mount() else { return };
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(256, 10);
    machine.import(&store, "base", None).unwrap();
    let base = fs::read(machine.path("memory")).unwrap();
    let path = ramfs.0.path().join("diff");
    let diff = File::create(&path).unwrap();
    diff.set_len(base.len() as u64).unwrap();
    for page in [3, 200] {
        diff.write_all_at(&[9; 4096], page * 4096).unwrap();
    }
    let mut request = machine.request("child", Some("base"));
    request.images[0].path.clone_from(&path);
    request.images[0].dirty = Some(Dirty::FileData);
    let error = store.import(&request, &NoProgress).unwrap_err();
    assert!(matches!(error, StoreError::Usage(_)) && error.to_string().contains("--dirty"), "{error}");
    // Told which pages are meant, it takes the rest from the parent.
    request.images[0].dirty = Some(Dirty::Ranges(vec![3..4, 200..201]));
    store.import(&request, &NoProgress).unwrap();
    let child = store.open_snapshot(&Name::new("child").unwrap()).unwrap();
    let copy = dir.path().join("copy");
    child.image(ImageKind::Memory, "memory").unwrap().export(&copy, &NoProgress).unwrap();
    let mut expected = base;
    for page in [3usize, 200] {
        expected[page * 4096..][..4096].fill(9);
    }
    assert!(fs::read(copy).unwrap() == expected);
}
