//! What a disk has after it was closed, killed, sealed, or its host crashed.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod support;

use std::sync::{Arc, Mutex};

use dormouse_disk::{Disk, DiskError, file::Directory, file::LocalDirectory, states::PageState};
use proptest::prelude::*;
use support::{PAGE, crash::Files, identity, open, options, read, source::TestSource};

/// Not a whole number of pages, and just over one piece.
const SIZE: usize = 36 * PAGE + 1536;
const SECTOR: usize = 512;
const SECTORS: usize = SIZE / SECTOR;

#[derive(Clone, Debug)]
enum Op {
    Write { sector: usize, sectors: usize, fill: u8 },
    Zero { sector: usize, sectors: usize },
    Discard { sector: usize, sectors: usize },
    Flush,
    Seal,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let place = (0..SECTORS).prop_flat_map(|at| (Just(at), 1..=(SECTORS - at).min(40)));
    let op = prop_oneof![
        6 => (place.clone(), 1u8..=255).prop_map(|((sector, sectors), fill)| Op::Write { sector, sectors, fill }),
        2 => place.clone().prop_map(|(sector, sectors)| Op::Zero { sector, sectors }),
        2 => place.prop_map(|(sector, sectors)| Op::Discard { sector, sectors }),
        3 => Just(Op::Flush),
        1 => Just(Op::Seal),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..24)
}

/// What each sector may hold after a crash: what it held at the last acknowledged flush, and all that was written since.
struct Model {
    now: Vec<u8>,
    may: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn new(bytes: &[u8]) -> Self {
        let may = bytes.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect();
        Model { now: bytes.to_vec(), may }
    }

    fn write(&mut self, sectors: std::ops::Range<usize>, content: impl Fn(usize) -> Vec<u8>) {
        for sector in sectors {
            let bytes = content(sector);
            self.now[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(&bytes);
            self.may[sector].push(bytes);
        }
    }

    fn flushed(&mut self) {
        *self = Model::new(&self.now);
    }

    fn check(&self, bytes: &[u8]) {
        for (sector, found) in bytes.chunks(SECTOR).enumerate() {
            assert!(
                self.may[sector].iter().any(|may| may == found),
                "sector {sector} holds {}.., which is neither what was flushed nor written since",
                found[0]
            );
        }
    }
}

fn fill(fill: u8) -> impl Fn(usize) -> Vec<u8> {
    move |sector| {
        let mut bytes = vec![fill; SECTOR];
        bytes[1] = sector as u8;
        bytes
    }
}

/// Whole pages within these sectors.
fn whole_pages(sector: usize, sectors: usize) -> std::ops::Range<usize> {
    let (per_page, end) = (PAGE / SECTOR, sector + sectors);
    let first = sector.next_multiple_of(per_page);
    first..(end / per_page * per_page).max(first)
}

/// Does `op`, the model first: what is written may be there from the moment it is asked for.
fn perform(op: &Op, disk: &mut Disk, model: &Mutex<Model>, reopen: impl Fn() -> Disk) {
    match *op {
        Op::Write { sector, sectors, fill: with } => {
            model.lock().unwrap().write(sector..sector + sectors, fill(with));
            let bytes: Vec<u8> = (sector..sector + sectors).flat_map(fill(with)).collect();
            disk.write((sector * SECTOR) as u64, &bytes).unwrap();
        }
        Op::Zero { sector, sectors } => {
            model.lock().unwrap().write(sector..sector + sectors, |_| vec![0; SECTOR]);
            disk.write_zeroes((sector * SECTOR) as u64, (sectors * SECTOR) as u64).unwrap();
        }
        Op::Discard { sector, sectors } => {
            model.lock().unwrap().write(whole_pages(sector, sectors), |_| vec![0; SECTOR]);
            disk.discard((sector * SECTOR) as u64, (sectors * SECTOR) as u64).unwrap();
        }
        Op::Flush => {
            disk.flush().unwrap();
            model.lock().unwrap().flushed();
        }
        Op::Seal => {
            disk.seal().unwrap();
            model.lock().unwrap().flushed();
        }
        Op::Reopen => {
            disk.flush().unwrap();
            model.lock().unwrap().flushed();
            *disk = reopen();
        }
    }
}

/// A sequence of yes and no that is the same every time.
struct Coins(u64);

impl Coins {
    fn toss(&mut self) -> bool {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 62 & 1 == 1
    }
}

/// Checks what a crash may leave now: all states if there are few changes, else none, all, all but one of each, and some.
fn crash_here(files: &Files, source: &Arc<TestSource>, model: &Model, coins: &mut Coins) {
    let check = |crashed: Arc<Files>| {
        let disk = open(source, SIZE as u64, &crashed).expect("an overlay opens after any crash");
        model.check(&read(&disk, 0, SIZE));
    };
    let changes = files.unsynced();
    if changes <= 5 {
        for subset in 0u32..1 << changes {
            let mut at = 0;
            check(files.after_crash(|| {
                at += 1;
                subset >> (at - 1) & 1 == 1
            }));
        }
        return;
    }
    check(files.after_crash(|| false));
    check(files.after_crash(|| true));
    for _ in 0..16 {
        check(files.after_crash(|| coins.toss()));
    }
    let mut left_out = 0;
    while left_out < changes {
        let mut at = 0;
        check(files.after_crash(|| {
            at += 1;
            at - 1 != left_out
        }));
        left_out += 1 + changes / 16;
    }
}

proptest! {
    #[test]
    fn disk_agrees_with_a_plain_array(ops in ops()) {
        let (source, files) = (TestSource::new(SIZE), Files::new());
        let model = Mutex::new(Model::new(&source.bytes()[..SIZE]));
        let reopen = || open(&source, SIZE as u64, &files).unwrap();
        let mut disk = reopen();
        for op in &ops {
            perform(op, &mut disk, &model, reopen);
            let model = model.lock().unwrap();
            prop_assert!(read(&disk, 0, SIZE) == model.now);
            let at = model.now[0] as usize * 37;
            prop_assert!(read(&disk, at as u64, 5_000) == model.now[at..at + 5_000]);
        }
    }

}

proptest! {
    // Each case opens some hundreds of crashed disks.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn acknowledged_flushes_survive_any_crash(ops in ops(), seed: u64) {
        let (source, files) = (TestSource::new(SIZE), Files::new());
        let model = Arc::new(Mutex::new(Model::new(&source.bytes()[..SIZE])));
        let coins = Arc::new(Mutex::new(Coins(seed)));
        {
            let (source, model, coins) = (source.clone(), model.clone(), coins.clone());
            files.before_sync(move |files| {
                crash_here(files, &source, &model.lock().unwrap(), &mut coins.lock().unwrap());
            });
        }
        let reopen = || open(&source, SIZE as u64, &files).unwrap();
        let mut disk = reopen();
        for op in &ops {
            perform(op, &mut disk, &model, reopen);
        }
        crash_here(&files, &source, &model.lock().unwrap(), &mut coins.lock().unwrap());
    }
}

/// A disk with one flushed page, and one that is written and not flushed.
fn half_flushed() -> (Arc<TestSource>, Arc<Files>, Disk) {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    disk.write(0, &[1; PAGE]).unwrap();
    disk.flush().unwrap();
    disk.write(PAGE as u64, &[2; PAGE]).unwrap();
    (source, files, disk)
}

#[test]
fn failed_sync_poisons_flushes_for_ever() {
    for after in 0..2 {
        let (source, files, disk) = half_flushed();
        files.fail_sync(after);
        assert!(matches!(disk.flush(), Err(DiskError::Poisoned(_))));
        // The syncs would succeed again: what they say is worth nothing, as the kernel reports each failure once.
        let syncs = files.syncs();
        for _ in 0..3 {
            assert!(matches!(disk.flush(), Err(DiskError::Poisoned(_))));
            assert!(matches!(disk.write(0, &[3; PAGE]), Err(DiskError::Poisoned(_))));
            assert!(matches!(disk.discard(0, PAGE as u64), Err(DiskError::Poisoned(_))));
            assert!(matches!(disk.seal(), Err(DiskError::Poisoned(_))));
        }
        assert_eq!(files.syncs(), syncs);
        // Reads go on, but for the page of which nobody knows what the disk has.
        assert_eq!(read(&disk, 0, PAGE), [1; PAGE]);
        assert!(read(&disk, 2 * PAGE as u64, PAGE) == source.bytes()[2 * PAGE..3 * PAGE]);
        let mut page = [0; PAGE];
        assert!(matches!(disk.read(PAGE as u64, &mut page), Err(DiskError::Poisoned(_))));
        drop(disk);
        let disk = open(&source, SIZE as u64, &files.after_crash(|| false)).unwrap();
        assert_eq!(read(&disk, 0, PAGE), [1; PAGE]);
        disk.write(PAGE as u64, &[4; PAGE]).unwrap();
        disk.flush().unwrap();
    }
}

#[test]
fn flush_without_writes_syncs_nothing() {
    let (_, files, disk) = half_flushed();
    let before = files.syncs();
    disk.flush().unwrap();
    assert_eq!(files.syncs(), before + 2, "data, then map");
    disk.write(0, &[5; SECTOR]).unwrap();
    disk.flush().unwrap();
    assert_eq!(files.syncs(), before + 3, "a page that the map knows needs the data alone");
    disk.flush().unwrap();
    assert_eq!(files.syncs(), before + 3);
}

#[test]
fn long_map_is_rewritten_and_bounded() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let disk = open(&source, SIZE as u64, &files).unwrap();
    let mut longest = 0;
    for round in 0..30_000u64 {
        let at = round % 32 * PAGE as u64;
        if round / 32 % 2 == 0 {
            disk.write(at, &[7; PAGE]).unwrap()
        } else {
            disk.discard(at, PAGE as u64).unwrap()
        }
        disk.flush().unwrap();
        let lengths = ["layer-1.map0", "layer-1.map1"].map(|name| files.content(name).unwrap().len());
        longest = longest.max(lengths[0].max(lengths[1]));
        assert!(round == 0 || lengths.contains(&0), "one file is in use");
    }
    assert!((256 << 10..300 << 10).contains(&longest), "{longest}");
    drop(disk);
    let disk = open(&source, SIZE as u64, &files.after_crash(|| false)).unwrap();
    // 30,000 = 937 * 32 + 16: the last, unfinished round discarded the first 16 pages, the round before wrote them all.
    assert_eq!(read(&disk, 0, 16 * PAGE), [0; 16 * PAGE]);
    assert_eq!(read(&disk, 16 * PAGE as u64, 16 * PAGE), [7; 16 * PAGE]);
}

#[test]
fn sealed_layer_lists_and_keeps_its_pages() {
    let (source, files, disk) = half_flushed();
    disk.discard(8 * PAGE as u64, PAGE as u64).unwrap();
    let sealed = disk.seal().unwrap();
    disk.write(0, &[9; PAGE]).unwrap();
    let changed: Vec<_> = sealed.changed().iter().map(|run| (run.first, run.pages, run.state)).collect();
    assert_eq!(changed, [(0, 2, PageState::Present), (8, 1, PageState::Zero)]);
    let mut pages = vec![0; 2 * PAGE];
    sealed.read(0, &mut pages).unwrap();
    assert!(pages[..PAGE] == [1; PAGE] && pages[PAGE..] == [2; PAGE], "what was written later is not in it");
    // Sectors of a page that a sealed layer holds are merged with it.
    disk.write(PAGE as u64 + 512, &[6; SECTOR]).unwrap();
    let again = disk.seal().unwrap();
    assert_eq!((sealed.number(), again.number()), (1, 2));
    drop(disk);
    let disk = open(&source, SIZE as u64, &files.after_crash(|| false)).unwrap();
    assert_eq!(disk.sealed_layers().len(), 2);
    assert_eq!(read(&disk, 0, PAGE), [9; PAGE]);
    let page = read(&disk, PAGE as u64, PAGE);
    assert!(page[..512] == [2; 512] && page[512..1024] == [6; 512] && page[1024..] == [2; 3072]);
    assert_eq!(read(&disk, 8 * PAGE as u64, PAGE), [0; PAGE]);
}

#[test]
fn overlay_of_another_disk_is_left_alone() {
    let (source, files, disk) = half_flushed();
    disk.flush().unwrap();
    drop(disk);
    let refused = |change: &dyn Fn(&mut dormouse_disk::Identity)| {
        let mut options = options(source.clone(), SIZE as u64, Some(files.clone()));
        options.identity.owner_token = 5;
        change(&mut options.identity);
        let before = (files.content("layer-1.map0"), files.content("layer-1.map1"));
        let error = Disk::open(options).err().unwrap();
        assert!(matches!(error, DiskError::OtherOwner(_)), "{error}");
        assert!(before == (files.content("layer-1.map0"), files.content("layer-1.map1")));
    };
    refused(&|identity| identity.snapshot[0] ^= 1);
    refused(&|identity| identity.image = "data".into());
    refused(&|identity| identity.size_bytes += 512);
    refused(&|identity| identity.owner_token = 0);
    // A later owner opens it, and then the earlier one no more.
    let mut later = options(source.clone(), SIZE as u64, Some(files.clone()));
    later.identity.owner_token = 2;
    assert_eq!(read(&Disk::open(later).unwrap(), 0, PAGE), [1; PAGE]);
    refused(&|identity| *identity = self::identity(SIZE as u64));
}

#[test]
fn damaged_map_is_an_error_and_not_an_empty_disk() {
    let (source, files, disk) = half_flushed();
    drop(disk);
    for name in ["layer-1.map0", "layer-1.map1"] {
        files.put(name, vec![0; 4096]);
    }
    let error = open(&source, SIZE as u64, &files).err().unwrap();
    assert!(matches!(error, DiskError::Damaged { layer: 1, .. }), "{error}");
    assert!(files.content("layer-1.data").is_some_and(|data| data[..PAGE] == [1; PAGE]));
}

#[test]
fn missing_layer_is_an_error_and_not_an_older_disk() {
    let (source, files, disk) = half_flushed();
    disk.seal().unwrap();
    disk.write(0, &[9; PAGE]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    for name in ["layer-2.data", "layer-1.data"] {
        let files = files.copy();
        files.remove(name).unwrap();
        let error = open(&source, SIZE as u64, &files).err().unwrap();
        assert!(matches!(error, DiskError::Damaged { .. }), "{name}: {error}");
    }
}

#[test]
fn local_overlay_survives_its_process_and_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("overlay");
    let source = TestSource::new(SIZE);
    let attach = || {
        let directory: Arc<dyn Directory> = Arc::new(LocalDirectory::open(&path).unwrap());
        Disk::open(options(source.clone(), SIZE as u64, Some(directory))).unwrap()
    };
    let disk = attach();
    disk.write(700, &[1; 10_000]).unwrap();
    disk.discard(PAGE as u64, PAGE as u64).unwrap();
    disk.flush().unwrap();
    assert_eq!(LocalDirectory::open(&path).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let expected = read(&disk, 0, SIZE);
    drop(disk);
    assert!(read(&attach(), 0, SIZE) == expected);
}

#[test]
fn longest_image_name_comes_back() {
    let (source, files) = (TestSource::new(SIZE), Files::new());
    let attach = |name_bytes: usize| {
        let mut options = options(source.clone(), SIZE as u64, Some(files.clone()));
        options.identity.image = "x".repeat(name_bytes);
        Disk::open(options)
    };
    assert!(matches!(attach(129).err(), Some(DiskError::Identity(_))));
    drop(attach(128).unwrap());
    drop(attach(128).unwrap());
    assert!(matches!(attach(127).err(), Some(DiskError::OtherOwner(_))));
}
