//! What goes in comes out: byte for byte, sparse, and whatever this host has forgotten.
use std::{fs, os::unix::fs::MetadataExt as _};

use crate::home::{Home, image};

#[test]
fn memory_disks_and_states_come_back_byte_identical() {
    let home = Home::new();
    let (memory, root, data) = (image(1, 600, 0), image(2, 300, 1234), image(3, 1, 1));
    for (file, bytes) in [("m", &memory), ("r", &root), ("d", &data)] {
        fs::write(home.path(file), bytes).unwrap();
    }
    fs::write(home.path("s"), b"device state").unwrap();
    fs::write(home.path("empty"), b"").unwrap();
    home.done(&[
        "import",
        "a",
        "--memory",
        "m",
        "--disk",
        "root=r",
        "--disk",
        "data=d",
        "--state",
        "vm=s",
        "--state",
        "none=empty",
    ]);
    let written = home.json(&[
        "export", "a", "--memory", "m2", "--disk", "root=r2", "--disk", "data=d2", "--state", "vm=s2",
        "--state", "none=e2",
    ]);
    assert_eq!(written["written"].as_array().unwrap().len(), 5);
    for (file, bytes) in
        [("m2", &memory[..]), ("r2", &root), ("d2", &data), ("s2", b"device state"), ("e2", b"")]
    {
        assert!(fs::read(home.path(file)).unwrap() == bytes, "{file} is not what was imported");
    }
}

#[test]
fn sizes_that_are_not_whole_pages_or_sections_come_back_exactly() {
    let home = Home::new();
    // One section is 64 MiB; the last two images end just after, and far inside, a second one.
    let section = 64 << 20;
    for (i, size) in [0u64, 1, 4095, 4096, 4097, section - 1, section, section + 1, 2 * section + 77]
        .into_iter()
        .enumerate()
    {
        let (source, name, copy) = (format!("source{i}"), format!("s{i}"), format!("copy{i}"));
        let file = fs::File::create(home.path(&source)).unwrap();
        file.set_len(size).unwrap();
        if size > 0 {
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", size - 1).unwrap();
        }
        home.done(&["import", &name, "--memory", &source]);
        home.done(&["export", &name, "--memory", &copy]);
        let same = fs::read(home.path(&source)).unwrap() == fs::read(home.path(&copy)).unwrap();
        assert!(same, "an image of {size} bytes came back differently");
    }
}

#[test]
fn holes_and_zero_pages_cost_nothing_and_come_back_as_holes() {
    let home = Home::new();
    let file = fs::File::create(home.path("huge")).unwrap();
    file.set_len(8 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 5 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 1 << 20], 6 << 30).unwrap();
    let report = home.json(&["import", "huge", "--memory", "huge"]);
    assert_eq!(report["logical_bytes"], 8u64 << 30);
    assert_eq!(report["nonzero_bytes"], 4096);
    assert!(report["stored_bytes"].as_u64().unwrap() < 8192, "{report}");
    home.done(&["export", "huge", "--memory", "copy"]);
    let copy = fs::metadata(home.path("copy")).unwrap();
    assert_eq!(copy.len(), 8 << 30);
    assert!(copy.blocks() * 512 < 1 << 20, "the export is not sparse: {} blocks", copy.blocks());
    let copy = fs::File::open(home.path("copy")).unwrap();
    let mut page = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut page, 5 << 30).unwrap();
    assert_eq!(page, [1; 4096]);
}

#[test]
fn a_child_shares_its_parent_and_comes_back_without_cache_and_index() {
    let home = Home::new();
    let parent = image(1, 2000, 0);
    let mut child = parent.clone();
    child[4096 * 1501..4096 * 1502].copy_from_slice(&[9; 4096]);
    child[4096 * 2..4096 * 3].fill(0);
    fs::write(home.path("parent"), &parent).unwrap();
    fs::write(home.path("child"), &child).unwrap();
    home.done(&["import", "p", "--memory", "parent"]);
    let same = home.json(&["import", "same", "--parent", "p", "--memory", "parent"]);
    assert_eq!(same["new_bytes"], 0, "an identical child has no new pages");
    let report = home.json(&["import", "c", "--parent", "p", "--memory", "child"]);
    assert_eq!(report["new_bytes"], 4096, "one page is new");

    // All that this host knows beside the store.
    fs::remove_dir_all(home.path(".cache/dormouse")).unwrap();
    let unrelated = home.json(&["import", "again", "--memory", "child"]);
    assert_eq!(unrelated["new_bytes"], 0, "without index and parent, shared pages are found in the store");
    for (name, bytes) in [("p", &parent), ("same", &parent), ("c", &child), ("again", &child)] {
        home.done(&["export", name, "--memory", "copy"]);
        assert!(fs::read(home.path("copy")).unwrap() == *bytes, "{name} came back differently");
    }
    assert_eq!(home.json(&["show", "c"])["parent"], home.json(&["show", "p"])["snapshot"]);
}

#[test]
fn a_diff_file_takes_its_holes_from_the_parent() {
    let home = Home::new();
    let parent = image(1, 1000, 0);
    fs::write(home.path("parent"), &parent).unwrap();
    let diff = fs::File::create(home.path("diff")).unwrap();
    diff.set_len(parent.len() as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&diff, &[3; 8192], 4096 * 100).unwrap();
    home.done(&["import", "p", "--memory", "parent"]);
    let report = home.json(&["import", "c", "--parent", "p", "--memory", "diff", "--diff", "memory"]);
    assert_eq!(report["read_bytes"], 8192, "only what changed is read");
    home.done(&["export", "c", "--memory", "copy"]);
    let mut expected = parent;
    expected[4096 * 100..4096 * 102].fill(3);
    assert!(fs::read(home.path("copy")).unwrap() == expected);
}

#[test]
fn a_failed_export_touches_no_file() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 50, 0)).unwrap();
    home.done(&["import", "a", "--memory", "m"]);
    fs::write(home.path("out"), b"precious").unwrap();
    let error = home.error(1, &["export", "a", "--memory", "out", "--disk", "nosuch=other"]);
    assert_eq!(error["kind"], "no_such_part");
    assert_eq!(fs::read(home.path("out")).unwrap(), b"precious");
    assert!(!home.path("other").exists());
    crate::home::flip(
        &home.objects("packs").into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap(),
    );
    assert_eq!(home.error(1, &["export", "a", "--memory", "out"])["kind"], "damaged");
    assert_eq!(fs::read(home.path("out")).unwrap(), b"precious");
    let left = fs::read_dir(home.path(""))
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".dormouse-export"));
    assert_eq!(left.count(), 0, "nothing half-written is left behind");
}

#[test]
fn a_bitmap_of_dirty_pages_is_as_good_as_their_ranges() {
    let home = Home::new();
    let parent = image(1, 1000, 0);
    fs::write(home.path("parent"), &parent).unwrap();
    let mut child = parent;
    let (mut words, pages) = (vec![0u64; 1000usize.div_ceil(64)], [0usize, 63, 64, 700, 701, 999]);
    for page in pages {
        child[4096 * page..4096 * (page + 1)].fill(3);
        // As KVM has them: words of 64 bits, the lowest bit first.
        words[page / 64] |= 1 << (page % 64);
    }
    let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    fs::write(home.path("child"), &child).unwrap();
    home.done(&["import", "p", "--memory", "parent"]);
    for (name, bytes) in [("a", bits.len()), ("b", 125)] {
        fs::write(home.path("bits"), &bits[..bytes]).unwrap();
        let bitmap = format!("memory={}", home.path("bits").display());
        let import =
            ["import", name, "--parent", "p", "--memory", "child", "--dirty-bitmap", bitmap.as_str()];
        let report = home.json(&import);
        assert_eq!(report["read_bytes"], 6 * 4096, "only what changed is read");
        home.done(&["export", name, "--memory", "copy"]);
        assert!(fs::read(home.path("copy")).unwrap() == child);
    }
    fs::write(home.path("bits"), &bits[..100]).unwrap();
    let bitmap = format!("memory={}", home.path("bits").display());
    let wrong = ["import", "c", "--parent", "p", "--memory", "child", "--dirty-bitmap", bitmap.as_str()];
    let ran = home.run(&wrong);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("has 100 bytes; its 1000 pages of 4 KiB take 125"), "{}", ran.stderr);
    let twice = [&wrong[..], &["--dirty", "memory=0..1"]].concat();
    assert!(home.run(&twice).stderr.contains("given twice"));
    assert_eq!(home.run(&["import", "c", "--memory", "child", "--dirty-bitmap", &bitmap]).code, 2);
}

#[test]
fn dirty_pages_are_read_and_everything_else_is_the_parents() {
    let home = Home::new();
    let parent = image(1, 1000, 0);
    fs::write(home.path("parent"), &parent).unwrap();
    let mut child = parent;
    child[4096 * 100..4096 * 102].fill(3);
    child[4096 * 700..4096 * 701].fill(4);
    fs::write(home.path("child"), &child).unwrap();
    fs::write(home.path("ranges"), "100..102\n700\n").unwrap();
    home.done(&["import", "p", "--memory", "parent"]);
    let ranges = format!("memory=@{}", home.path("ranges").display());
    for (name, dirty) in [("a", "memory=100..102,700"), ("b", ranges.as_str())] {
        let report = home.json(&["import", name, "--parent", "p", "--memory", "child", "--dirty", dirty]);
        assert_eq!(report["read_bytes"], 3 * 4096, "only what changed is read");
        home.done(&["export", name, "--memory", "copy"]);
        assert!(fs::read(home.path("copy")).unwrap() == child);
    }
}
