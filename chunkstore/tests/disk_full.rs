//! Real full disks and real read-only ones.
//!
//! They are mounted for the occasion, which takes root. Where that is not permitted the tests say that they skip
//! themselves, and with `DORMOUSE_REQUIRE_MOUNT=1` they fail instead.
#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, path::Path, process::Command, time::Duration};

use common::{Machine, files_below};
use dormouse_chunkstore::{GcOptions, NoProgress, Store, StoreError, StoreOptions, VerifyDepth};
use dormouse_core::{ImageKind, Name};

/// A small file system of its own, until it is dropped.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(megabytes: u32) -> Option<Self> {
        Self::mount_with(&format!("size={megabytes}m"))
    }

    fn mount_with(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).output();
        let why = match mount {
            Ok(output) if output.status.success() => return Some(Disk(dir)),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(e) => e.to_string(),
        };
        assert!(std::env::var("DORMOUSE_REQUIRE_MOUNT").as_deref() != Ok("1"), "no disk to fill: {why}");
        dormouse_testkit::skipped!("a test on a disk of its own, since none can be mounted here: {why}");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn make_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(self.path()).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

/// Without a cache, so that only the store is on the disk.
fn open(dir: &Path) -> Store {
    Store::open(dir.to_str().unwrap(), StoreOptions::default()).unwrap()
}

#[test]
fn an_import_onto_a_full_disk_says_so_and_leaves_the_store_as_it_was() {
    let Some(disk) = Disk::mount(6) else { return };
    let root = disk.path().join("store");
    let small = Machine::new(300, 30);
    small.import(&open(&root), "small", None).unwrap();
    let before = files_below(&root);
    let used = |dir: &Path| rustix::fs::statvfs(dir).map(|s| s.f_blocks - s.f_bfree).unwrap();
    let used_before = used(disk.path());
    // Some 9 MB: less than a pack, and more than there is room for.
    let mut large = Machine::new(4_500, 10);
    large.change(1, 4_400);
    for parent in [None, Some("small")] {
        let error = large.import(&open(&root), "large", parent).unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
        assert!(error.to_string().contains("full"), "{error}");
        assert_eq!(files_below(&root), before, "not even a temporary file is left");
        assert_eq!(used(disk.path()), used_before);
    }
    small.remember().check(&open(&root), "small").unwrap();
    assert!(open(&root).verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

#[test]
fn a_disk_filled_by_others_to_any_level_never_breaks_the_store() {
    let Some(disk) = Disk::mount(4) else { return };
    let root = disk.path().join("store");
    let mut machine = Machine::new(100, 10);
    machine.import(&open(&root), "a", None).unwrap();
    let a = machine.remember();
    machine.change(1, 90);
    let (mut full, mut stored) = (0, 0);
    for spare_kib in [0, 4, 8, 16, 32, 64, 128, 192, 224, 240, 256, 288, 320, 512, 1024] {
        let filler = disk.path().join("filler");
        let free = rustix::fs::statvfs(disk.path()).map(|s| s.f_bfree * s.f_frsize).unwrap();
        fs::write(&filler, vec![1; (free as usize).saturating_sub(spare_kib << 10)]).unwrap();
        match machine.import(&open(&root), "b", Some("a")) {
            Ok(_) => {
                stored += 1;
                machine.remember().check(&open(&root), "b").unwrap();
            }
            Err(StoreError::Full { .. }) => {
                full += 1;
                assert!(open(&root).open_snapshot(&Name::new("b").unwrap()).is_err());
            }
            Err(e) => panic!("{spare_kib} KiB free: {e:?}"),
        }
        a.check(&open(&root), "a").unwrap();
        assert!(open(&root).verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
        fs::remove_file(&filler).unwrap();
        // What the attempt left is not needed; the next one begins as this one did.
        if stored > 0 {
            break;
        }
    }
    assert!(full > 0 && stored > 0, "{full} times full, {stored} times not");
}

#[test]
fn removing_a_snapshot_works_on_a_full_disk() {
    let Some(disk) = Disk::mount(4) else { return };
    let root = disk.path().join("store");
    Machine::new(100, 10).import(&open(&root), "a", None).unwrap();
    let free = rustix::fs::statvfs(disk.path()).map(|s| s.f_bfree * s.f_frsize).unwrap();
    fs::write(disk.path().join("filler"), vec![1; free as usize]).unwrap();
    let name = Name::new("a").unwrap();
    open(&root).remove(&name).unwrap();
    assert!(open(&root).list().unwrap().is_empty());
    assert_eq!(open(&root).standing(&name).unwrap().sequence, 2, "that it was removed is known, too");
}

/// Fills the disk: to its last inode if it has few, or else to its last block.
fn fill(disk: &Path) {
    let free = rustix::fs::statvfs(disk).unwrap();
    if free.f_files < 1000 {
        (0..).find(|n| fs::File::create(disk.join(format!("filler-{n}"))).is_err()).unwrap();
    } else {
        let mut filler = fs::File::options().create(true).append(true).open(disk.join("filler")).unwrap();
        std::io::Write::write_all(&mut filler, &vec![1; (free.f_bfree * free.f_frsize) as usize]).unwrap();
    }
    let free = rustix::fs::statvfs(disk).unwrap();
    assert!(free.f_bfree == 0 || free.f_ffree == 0, "there is room left");
}

#[test]
fn a_full_disk_is_freed_by_collecting() {
    for options in ["size=6m", "size=64m,nr_inodes=150"] {
        let Some(disk) = Disk::mount_with(options) else { return };
        let root = disk.path().join("store");
        // Several packs and roots, so that marks for all do not fit.
        for salt in 0..12 {
            let name = format!("m{salt}");
            Machine::unlike(salt, 60, 4).import(&open(&root), &name, None).unwrap();
        }
        let kept = Machine::unlike(99, 60, 4);
        kept.import(&open(&root), "kept", None).unwrap();
        fill(disk.path());
        let error = Machine::unlike(98, 60, 4).import(&open(&root), "x", None).unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{options}: {error:?}");
        for salt in 0..12 {
            open(&root).remove(&Name::new(format!("m{salt}")).unwrap()).unwrap();
        }
        let at_once = GcOptions { grace: Duration::ZERO, dry_run: false };
        // What removing names freed is taken as well.
        fill(disk.path());
        let report = open(&root).gc(at_once).unwrap();
        assert!(report.deleted_objects >= 36, "{options}: {report:?}");
        kept.remember().check(&open(&root), "kept").unwrap();
        assert!(open(&root).verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
        // There is room again, and some of it is kept back for the next time.
        Machine::unlike(98, 60, 4).import(&open(&root), "x", None).unwrap();
        assert!(root.join("reserve-0").exists());
    }
}

#[test]
fn a_read_only_store_can_be_read_and_denies_writes() {
    let Some(disk) = Disk::mount(8) else { return };
    let root = disk.path().join("store");
    let mut machine = Machine::new(100, 10);
    machine.import(&open(&root), "a", None).unwrap();
    disk.make_read_only();
    machine.remember().check(&open(&root), "a").unwrap();
    assert!(open(&root).verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    machine.change(1, 10);
    for (result, what) in [
        (machine.import(&open(&root), "b", Some("a")).map(drop), "import"),
        (open(&root).remove(&Name::new("a").unwrap()), "remove"),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{what}: {error:?}");
    }
}

#[test]
fn an_export_to_a_full_disk_leaves_no_file_behind() {
    let Some(disk) = Disk::mount(1) else { return };
    let store = common::store_in_memory();
    Machine::new(600, 10).import(&store, "a", None).unwrap();
    let snapshot = store.open_snapshot(&Name::new("a").unwrap()).unwrap();
    let image = snapshot.image(ImageKind::Memory, "memory").unwrap();
    let error = image.export(&disk.path().join("memory"), &NoProgress).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
    assert_eq!(files_below(disk.path()), Vec::<std::path::PathBuf>::new());
    // What was there before stays.
    fs::write(disk.path().join("memory"), b"older").unwrap();
    image.export(&disk.path().join("memory"), &NoProgress).unwrap_err();
    assert_eq!(fs::read(disk.path().join("memory")).unwrap(), b"older");
    assert_eq!(files_below(disk.path()).len(), 1);
}

#[test]
fn a_cache_on_a_full_or_read_only_disk_stops_no_import() {
    for read_only in [false, true] {
        let Some(disk) = Disk::mount(1) else { return };
        if read_only {
            disk.make_read_only();
        } else {
            fs::write(disk.path().join("filler"), vec![1; 700 << 10]).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions { cache_dir: Some(disk.path().join("cache")), ..Default::default() };
        let store = Store::open(dir.path().to_str().unwrap(), options).unwrap();
        // Ids and places of this many pages do not fit.
        let mut machine = Machine::new(6_000, 10);
        machine.import(&store, "a", None).unwrap();
        machine.change(1, 50);
        let report = machine.import(&store, "b", Some("a")).unwrap();
        assert!(report.new_bytes <= 51 * 4096, "{report:?}");
        machine.remember().check(&store, "b").unwrap();
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    }
}
