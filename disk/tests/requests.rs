//! What reads see beside writes, fetches and failures.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use dormouse_disk::{
    Disk, DiskError, Policy, SectorKind,
    budget::Budget,
    source::{SourceErrorKind, ZeroSource},
};
use support::{PAGE, crash::Files, open, options, read, source::TestSource};

const SIZE: usize = 64 * PAGE;

#[test]
fn late_fetch_never_overwrites_newer_write() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    source.hold();
    thread::scope(|scope| {
        // A read and a sector's write both wait for the page, while the whole page is written.
        let reader = scope.spawn(|| read(&disk, 0, PAGE));
        let writer = scope.spawn(|| disk.write(512, &[5; 512]));
        while disk.counters().fetches_joined.load(Ordering::Relaxed) < 1 {
            thread::yield_now();
        }
        disk.write(0, &[7; PAGE]).unwrap();
        source.release();
        assert_eq!(reader.join().unwrap().iter().filter(|byte| ![5, 7].contains(*byte)).count(), 0);
        writer.join().unwrap().unwrap();
    });
    let page = read(&disk, 0, PAGE);
    assert!(page[..512].iter().chain(&page[1024..]).all(|byte| *byte == 7), "the newer write is there");
    assert!(page[512..1024].iter().all(|byte| *byte == 5 || *byte == 7));
}

#[test]
fn read_across_fetched_and_unfetched_sees_newest() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    disk.write(PAGE as u64, &[1; PAGE]).unwrap();
    source.hold();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&disk, 0, 12 * PAGE));
        source.wait_asked(0);
        source.wait_asked(1);
        // Acknowledged while the reader waits: one page in a frame that it fetches, one discarded.
        disk.write(2 * PAGE as u64, &[2; PAGE]).unwrap();
        disk.discard(9 * PAGE as u64, PAGE as u64).unwrap();
        source.release();
        let mut expected = source.bytes()[..12 * PAGE].to_vec();
        expected[PAGE..2 * PAGE].fill(1);
        expected[2 * PAGE..3 * PAGE].fill(2);
        expected[9 * PAGE..10 * PAGE].fill(0);
        assert!(reader.join().unwrap() == expected);
    });
}

#[test]
fn readers_of_one_frame_fetch_it_once() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    source.hold();
    thread::scope(|scope| {
        let first = scope.spawn(|| read(&disk, 8 * PAGE as u64, PAGE));
        source.wait_asked(1);
        let second = scope.spawn(|| read(&disk, 8 * PAGE as u64, 8 * PAGE));
        let third = scope.spawn(|| disk.write(9 * PAGE as u64 + 512, &[3; 512]));
        while disk.counters().fetches_joined.load(Ordering::Relaxed) < 2 {
            thread::yield_now();
        }
        assert_eq!(source.asked(1), 1);
        source.release();
        first.join().unwrap();
        second.join().unwrap();
        third.join().unwrap().unwrap();
    });
}

#[test]
fn large_read_asks_for_all_frames_at_once() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    source.hold();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&disk, 0, SIZE));
        // Four threads fetch: the first four frames that are not zero are under way together.
        [0, 1, 3, 4].into_iter().for_each(|frame| source.wait_asked(frame));
        source.release();
        assert!(reader.join().unwrap() == source.bytes());
    });
    assert_eq!(disk.counters().frames_fetched.load(Ordering::Relaxed), 6);
}

#[test]
fn reading_in_order_fetches_ahead() {
    let size = 512 * PAGE;
    let (source, files) = (TestSource::with_cache(size, true), Files::new());
    let disk = open(&source, size as u64, &files).unwrap();
    read(&disk, 0, 8 * PAGE);
    read(&disk, 8 * PAGE as u64, 8 * PAGE);
    // Nobody asks for these but the read-ahead.
    [3, 4, 6, 7, 9].into_iter().for_each(|frame| source.wait_asked(frame));
    assert_eq!(disk.counters().frames_fetched.load(Ordering::Relaxed), 2);
}

#[test]
fn base_that_is_away_fails_reads_in_time() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let mut options = options(source.clone(), SIZE as u64, Some(files));
    options.policy = Policy { base_wait_max: Duration::from_millis(30), ..Policy::default() };
    let disk = Disk::open(options).unwrap();
    source.hold();
    let mut page = vec![0xee; PAGE];
    let error = disk.read(0, &mut page).unwrap_err();
    assert!(matches!(error, DiskError::Unavailable { .. }) && error.is_passing(), "{error}");
    // A write to a part of a page needs the page; one of whole pages does not.
    assert!(matches!(disk.write(1, &[1]), Err(DiskError::Unavailable { .. })));
    disk.write(PAGE as u64, &[1; PAGE]).unwrap();
    disk.flush().unwrap();
    assert_eq!(read(&disk, PAGE as u64, PAGE), [1; PAGE]);
    source.release();
}

#[test]
fn passing_errors_are_retried_and_others_told() {
    let source = TestSource::new(SIZE);
    let mut options = options(source.clone(), SIZE as u64, Some(Files::new()));
    options.policy.read_ahead_pages_max = 0;
    let disk = Disk::open(options).unwrap();
    source.fail(SourceErrorKind::Retryable, 2);
    assert!(read(&disk, 0, PAGE) == source.bytes()[..PAGE]);
    source.fail(SourceErrorKind::Damaged, 1);
    assert!(read(&disk, 0, PAGE) == source.bytes()[..PAGE]);
    source.fail(SourceErrorKind::Damaged, 2);
    let mut page = vec![0; PAGE];
    assert!(matches!(disk.read(0, &mut page), Err(DiskError::Base(_))));
    source.fail(SourceErrorKind::Gone, 1);
    assert!(matches!(disk.read(0, &mut page), Err(DiskError::Base(_))));
    assert_eq!(source.asked(0), 3 + 2 + 2 + 1);
}

#[test]
fn requests_outside_the_disk_are_refused() {
    let disk = open(&TestSource::new(SIZE), SIZE as u64, &Files::new()).unwrap();
    let out = |result| matches!(result, Err(DiskError::OutOfRange { .. }));
    for (offset, length) in [(SIZE as u64, 1), (u64::MAX, 2), (SIZE as u64 - 1, 2), (u64::MAX - 1, 1)] {
        assert!(out(disk.read(offset, &mut vec![0; length])));
        assert!(out(disk.write(offset, &vec![0; length])));
        assert!(out(disk.discard(offset, length as u64)));
        assert!(out(disk.write_zeroes(offset, length as u64)));
        assert!(out(disk.status(offset, length as u64, 1).map(drop)));
    }
    assert!(out(disk.discard(1, u64::MAX)));
    disk.read(SIZE as u64, &mut []).unwrap();
}

#[test]
fn disk_without_overlay_takes_no_writes() {
    let source = TestSource::new(SIZE);
    let disk = Disk::open(options(source.clone(), SIZE as u64, None)).unwrap();
    assert!(read(&disk, 100, 9_000) == source.bytes()[100..9_100]);
    assert!(matches!(disk.write(0, &[1]), Err(DiskError::ReadOnly)));
    assert!(matches!(disk.discard(0, 4096), Err(DiskError::ReadOnly)));
    assert!(matches!(disk.write_zeroes(0, 0), Err(DiskError::ReadOnly)));
    disk.flush().unwrap();
}

#[test]
fn status_tells_data_from_holes() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    let page = PAGE as u64;
    disk.write(17 * page, &[1; PAGE]).unwrap();
    disk.discard(2 * page, page).unwrap();
    use SectorKind::{Data, Hole};
    let runs = disk.status(0, 24 * page, 100).unwrap();
    let expected = [(2, Data), (1, Hole), (13, Data), (1, Hole), (1, Data), (6, Hole)];
    assert_eq!(runs, expected.map(|(pages, kind)| (pages * page, kind)));
    assert_eq!(disk.status(100, 24 * page, 1).unwrap(), [(2 * page - 100, Data)]);
    assert_eq!(source.asked_in_all(), 0, "no frame is fetched for it");
}

#[test]
fn full_budget_makes_writes_wait() {
    let (budget, files) = (Arc::new(Budget::new(4 * PAGE as u64)), Files::new());
    let mut options = options(Arc::new(ZeroSource), SIZE as u64, Some(files));
    options.budget = budget.clone();
    let disk = Disk::open(options).unwrap();
    disk.write(0, &[1; 4 * PAGE]).unwrap();
    // Pages that are there take no room.
    disk.write(100, &[2; PAGE]).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write(8 * PAGE as u64, &[3; PAGE]));
        while budget.waits() == 0 {
            thread::yield_now();
        }
        disk.discard(0, PAGE as u64).unwrap();
        writer.join().unwrap().unwrap();
    });
    assert_eq!(budget.held_bytes(), 4 * PAGE as u64);
    drop(disk);
    assert_eq!(budget.held_bytes(), 0);
}

#[test]
fn write_that_finds_no_room_fails_in_time() {
    let mut options = options(Arc::new(ZeroSource), SIZE as u64, Some(Files::new()));
    options.budget = Arc::new(Budget::new(PAGE as u64));
    options.policy.space_wait_max = Duration::from_millis(20);
    let disk = Disk::open(options).unwrap();
    disk.write(0, &[1; PAGE]).unwrap();
    let error = disk.write(PAGE as u64, &[1; PAGE]).unwrap_err();
    assert!(matches!(error, DiskError::Full { .. }) && error.is_passing());
    assert_eq!(read(&disk, PAGE as u64, PAGE), [0; PAGE]);
}

#[test]
fn idle_disk_holds_little_memory() {
    let size = 32u64 << 30;
    let mut states = dormouse_disk::states::PageStates::new();
    for page in (0..size / PAGE as u64).step_by(16 * 1024) {
        states.set(page..page + 1, dormouse_disk::states::PageState::Present);
    }
    assert!(states.memory_bytes() <= (2 << 20) + (64 << 10), "{}", states.memory_bytes());
}
