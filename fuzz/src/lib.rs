//! Fuzz targets: for every decoder of Dormouse's format and protocols, what must hold of any bytes.
//!
//! Each is a plain function. `tests/replay.rs` calls them on every toolchain, with the seeds, what fuzzing has found, and
//! mutations of both; `scripts/fuzz` links them to libFuzzer (`src/main.rs`).

#[path = "../../chunkstore/src/disk_cache.rs"]
#[expect(dead_code, reason = "private to its crate, and only reading is fuzzed")]
#[cfg_attr(test, expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where"))]
mod disk_cache;
mod input;
pub mod mutate;
#[path = "../../chunkstore/src/page_cache.rs"]
mod page_cache;
mod targets;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it is called: as its file in `src/targets` and the folder of its seeds.
    pub name: &'static str,
    /// Panics where the bytes show a fault of what is tested.
    pub check: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)*) => {
        /// Every target, by name.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), check: targets::$name::check }),*];
    };
}

targets! {
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

/// The target of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|target| target.name == name)
}
