//! How fast Dormouse is on this machine: each row is a measured time and its physical floor, measured in the same run
//! and in turns, so that whatever else the machine does falls on both.
//!
//! | module | rows |
//! |---|---|
//! | [`install`] | working sets from the hot and the warm tier |
//! | [`fault`] | single faults, and all of a guest's memory touched in random order |
//! | [`cold`] | resumes from a modelled object store |
//! | [`grow`] | what must not grow with a machine's size or age; many machines at once |
//! | [`covering`] | how much of what is needed was prefetched, and what was prefetched in vain |
//!
//! `dormouse bench` prints them; the criterion benches of this package cover the same ground.
#![forbid(unsafe_code)]

pub mod cold;
pub mod covering;
pub mod fault;
pub mod grow;
pub mod guest;
pub mod install;
mod machine;
pub mod raw;
pub mod row;
pub mod stats;

use std::path::PathBuf;

use dormouse_chunkstore::StoreError;
use dormouse_restore::{PlanError, RestoreError, SourceError, UffdError};

pub use guest::Bench;
pub use row::Row;

/// What to measure.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A guest's memory, raw; without one, an image made of this machine's programs and libraries.
    pub image: Option<PathBuf>,
    /// Fewer repetitions, smaller sets: for a first look.
    pub quick: bool,
    /// Only rows whose names begin so.
    pub only: Option<String>,
}

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file.
    #[error("{what}: {error}")]
    File {
        /// What was done with it.
        what: String,
        /// The system's word.
        error: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The restore.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A page.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The measurement itself.
    #[error("{0}")]
    Wrong(String),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, BenchError>;

impl BenchError {
    pub(crate) fn file(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |error| BenchError::File { what: what.into(), error }
    }
    pub(crate) fn wrong(what: impl Into<String>) -> Self {
        BenchError::Wrong(what.into())
    }
}

type Measure = fn(&Bench) -> Result<Vec<Row>>;

/// A row's name, and what it is.
type Named = (&'static str, &'static str);

/// What is measured together, and the rows that come of it.
const GROUPS: [(&[Named], Measure); 12] = [
    (
        &[(
            "install_hot_16mib",
            "16 MiB of first pages that are decoded in memory, put into a machine's; against raw copies of them",
        )],
        |b| install::hot(b, 16),
    ),
    (&[("install_hot_64mib", "the same with 64 MiB")], |b| install::hot(b, 64)),
    (
        &[(
            "install_warm_64mib",
            "64 MiB of first pages on local disk: opened, read, decoded, put into a machine's memory; against the slower of \
             plain zstd on as many cores and raw copies",
        )],
        install::warm,
    ),
    (
        &[(
            "fault_hit",
            "a touch of a page whose frame is decoded in memory; against a userfaultfd loop and nothing else",
        )],
        fault::hit,
    ),
    (
        &[(
            "fault_miss_local",
            "a touch of a page whose frame is on local disk; against a bare answer and plain zstd",
        )],
        fault::miss_local,
    ),
    (
        &[
            (
                "touch_all_random",
                "every page of a guest touched in random order while it is filled behind; against bare answers read from a raw file",
            ),
            ("touch_all_on_demand", "the same without filling"),
        ],
        fault::touch_all,
    ),
    (
        &[
            (
                "cold_first_page",
                "from the first request to a store 20 ms away to the first page in place; against one first byte",
            ),
            (
                "cold_ready_24mib",
                "the same until 24 MiB are in place; against their way at the store's speed",
            ),
            ("cold_requests", "how many requests that took; against those of a reader in no hurry"),
        ],
        cold::near,
    ),
    (
        &[
            ("cold_tail", "the cold_* rows with a store of which a few answers are slow; only reported"),
            ("cold_5ms", "the cold_* rows with a store 5 ms away; only reported"),
        ],
        cold::others,
    ),
    (
        &[(
            "grow_vm_size",
            "a wake of a machine of 64 GiB with 16 MiB of first pages; against one of 128 MiB",
        )],
        grow::vm_size,
    ),
    (
        &[("grow_generations", "a wake of a machine put to sleep 1,000 times (quick: 100); against once")],
        grow::generations,
    ),
    (
        &[(
            "many_100",
            "p99 of 100 machines that wake at once from memory; against raw copies of all their pages",
        )],
        grow::many,
    ),
    (
        &[
            ("coverage", "of what a machine touches, what another's working set brought; 1 is all"),
            ("overfetch", "of what that brought, what is never touched"),
        ],
        covering::rows,
    ),
];

/// What the row called `row` is, and what it is compared to.
pub fn legend(row: &str) -> &'static str {
    let named = GROUPS.iter().flat_map(|(rows, _)| rows.iter());
    named.filter(|(name, _)| row.starts_with(name)).map(|(_, legend)| *legend).next().unwrap_or_default()
}

/// Measures what `options` ask for; `progress` hears what is being measured.
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Vec<Row>> {
    let groups = chosen(options)?;
    progress("preparing a guest's memory");
    measure(&Bench::new(options)?, options, &groups, progress)
}

/// Has `sampler` take the samples of all that `options` ask for, instead of this crate.
pub fn run_by(sampler: Box<dyn stats::Sampler>, options: &Options) -> Result<()> {
    let bench = Bench::new(options)?.sampled_by(sampler);
    measure(&bench, options, &chosen(options)?, |_| {}).map(drop)
}

fn wanted(options: &Options, name: &str) -> bool {
    options.only.as_ref().is_none_or(|only| name.starts_with(only.as_str()))
}

fn chosen(options: &Options) -> Result<Vec<(&'static [Named], Measure)>> {
    let whole = |name: &str| options.only.as_ref().is_some_and(|only| only.starts_with(name));
    let chosen = |rows: &[Named]| rows.iter().any(|(name, _)| wanted(options, name) || whole(name));
    let groups: Vec<_> = GROUPS.into_iter().filter(|(names, _)| chosen(names)).collect();
    if groups.is_empty() {
        let known: Vec<_> = GROUPS.iter().flat_map(|(rows, _)| rows.iter().map(|(name, _)| *name)).collect();
        return Err(BenchError::wrong(format!("no row is called so; there are {}", known.join(", "))));
    }
    Ok(groups)
}

fn measure(
    bench: &Bench,
    options: &Options,
    groups: &[(&'static [Named], Measure)],
    mut progress: impl FnMut(&str),
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (names, measure) in groups {
        progress(names.first().map_or("", |(name, _)| name));
        rows.extend(measure(bench)?);
    }
    rows.retain(|row| wanted(options, &row.name));
    Ok(rows)
}
