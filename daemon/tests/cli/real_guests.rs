//! Round trips over the memories and disks of real guests, where `DORMOUSE_VMSET` names a directory of them.
use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::home::Home;

#[test]
fn real_memories_and_disks_come_back_byte_identical_as_a_chain_of_children() {
    let Some(dir) = std::env::var_os("DORMOUSE_VMSET").map(PathBuf::from) else {
        dormouse_testkit::skipped!("DORMOUSE_VMSET does not name a directory of *.mem and *.disk files");
        return;
    };
    let with_extension = |extension: &str| {
        let files = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
        files.sort();
        files
    };
    let memories = with_extension("mem");
    assert!(memories.len() > 1, "{} holds no chain of memories", dir.display());
    let home = Home::new();
    let mut parent: Option<String> = None;
    for memory in &memories {
        let name = memory.file_stem().unwrap().to_str().unwrap().to_owned();
        let disk = memory.with_extension("disk");
        let disk_argument = format!("root={}", disk.display());
        let mut args = vec!["import", &name, "--memory", memory.to_str().unwrap()];
        if disk.exists() {
            args.extend(["--disk", &disk_argument]);
        }
        if let Some(parent) = &parent {
            args.extend(["--parent", parent]);
        }
        home.done(&args);
        parent = Some(name);
    }
    fs::remove_dir_all(home.path(".cache/dormouse")).unwrap();
    for memory in &memories {
        let name = memory.file_stem().unwrap().to_str().unwrap();
        let disk = memory.with_extension("disk");
        home.done(&["export", name, "--memory", "memory"]);
        assert_same(memory, &home.path("memory"));
        if disk.exists() {
            home.done(&["export", name, "--disk", "root=disk"]);
            assert_same(&disk, &home.path("disk"));
        }
    }
    assert_eq!(home.json(&["verify"])["clean"], true);
    eprintln!("{}", home.done(&["du"]).stdout);
}

fn assert_same(one: &Path, other: &Path) {
    let (mut a, mut b) = (File::open(one).unwrap(), File::open(other).unwrap());
    assert_eq!(a.metadata().unwrap().len(), b.metadata().unwrap().len());
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = a.read(&mut left).unwrap();
        if n == 0 {
            return;
        }
        b.read_exact(&mut right[..n]).unwrap();
        assert!(left[..n] == right[..n], "{} came back differently", one.display());
    }
}
