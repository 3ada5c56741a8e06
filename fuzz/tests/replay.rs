//! Every fuzz target, on its seeds (`seeds/TARGET`), on what fuzzing has found (`findings/TARGET`), on the golden files of
//! the format, and on mutations of all these, the same in each run.

use std::{fs, path::Path};

use dormouse_fuzz::{
    TARGETS, Target,
    mutate::{Dice, mutate},
};

/// Mutations tried of each target.
const MUTATIONS: usize = 20_000;
/// Longest input that is mutated: what is longer takes its time, and shows little more.
const MUTATED_BYTES_MAX: usize = 16 << 10;

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a folder is read").path()).collect();
    paths.sort();
    paths.iter().map(|p| (p.display().to_string(), fs::read(p).expect("a seed is read"))).collect()
}

fn replay(target: Target) {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = files(&package.join("seeds").join(target.name));
    assert!(!own.is_empty(), "put a seed that {} accepts into fuzz/seeds/{0}", target.name);
    let found = files(&package.join("findings").join(target.name));
    let golden = files(&package.join("../core/tests/golden"));
    let mut inputs: Vec<_> = [own, found, golden].into_iter().flatten().collect();
    for (path, bytes) in &inputs {
        println!("{} on {path}", target.name);
        (target.check)(bytes);
    }
    inputs.retain(|(_, bytes)| bytes.len() <= MUTATED_BYTES_MAX);
    for round in 0..MUTATIONS {
        let (path, bytes) = &inputs[round % inputs.len()];
        let mut dice = Dice::new(round as u64);
        let other = dice.below(inputs.len());
        let mutated = mutate(&mut dice, bytes, &inputs[other].1);
        let told = Told { path, round, bytes: &mutated };
        (target.check)(&mutated);
        std::mem::forget(told);
    }
}

/// What to keep of a mutation that shows a fault, printed when the check panics.
struct Told<'a> {
    path: &'a str,
    round: usize,
    bytes: &'a [u8],
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let text = self.bytes.escape_ascii();
        println!("mutation {} of {}, to be kept in fuzz/findings: b\"{text}\"", self.round, self.path);
    }
}

macro_rules! replay {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(dormouse_fuzz::target(stringify!($name)).expect("a target"));
        })*
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
    };
}

replay! {
    ch_config
    ch_protocol
    disk_cache
    envelope
    first_touched
    footer
    frame
    guest_state
    http
    keeper
    kept_states
    keyring
    name
    nbd
    overlay_map
    pack
    reference
    regions
    root
    root_raw
    seal
    section
    stream
    trailer
    wire
    working_set
}

#[test]
fn every_target_is_listed_and_replayed() {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names, REPLAYED);
    let mut written: Vec<_> = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/targets"))
        .iter()
        .filter_map(|(path, _)| Some(Path::new(path).file_stem()?.to_str()?.to_owned()))
        .filter(|name| name != "mod")
        .collect();
    written.sort();
    assert_eq!(names, written, "a file of src/targets is a target");
}
