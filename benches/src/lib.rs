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

/// What is measured together, and the rows that come of it.
const GROUPS: [(&[&str], Measure); 12] = [
    (&["install_hot_16mib"], |b| install::hot(b, 16)),
    (&["install_hot_64mib"], |b| install::hot(b, 64)),
    (&["install_warm_64mib"], install::warm),
    (&["fault_hit"], fault::hit),
    (&["fault_miss_local"], fault::miss_local),
    (&["touch_all_random", "touch_all_on_demand"], fault::touch_all),
    (&["cold_first_page", "cold_ready_24mib", "cold_requests"], cold::near),
    (&["cold_tail", "cold_5ms"], cold::others),
    (&["grow_vm_size"], grow::vm_size),
    (&["grow_generations"], grow::generations),
    (&["many_100"], grow::many),
    (&["coverage", "overfetch"], covering::rows),
];

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

fn chosen(options: &Options) -> Result<Vec<(&'static [&'static str], Measure)>> {
    let whole = |name: &&str| options.only.as_ref().is_some_and(|only| only.starts_with(*name));
    let chosen = |names: &[&str]| names.iter().any(|name| wanted(options, name) || whole(name));
    let groups: Vec<_> = GROUPS.into_iter().filter(|(names, _)| chosen(names)).collect();
    if groups.is_empty() {
        let known: Vec<_> = GROUPS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
        return Err(BenchError::wrong(format!("no row is called so; there are {}", known.join(", "))));
    }
    Ok(groups)
}

fn measure(
    bench: &Bench,
    options: &Options,
    groups: &[(&'static [&'static str], Measure)],
    mut progress: impl FnMut(&str),
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (names, measure) in groups {
        progress(names[0]);
        rows.extend(measure(bench)?);
    }
    rows.retain(|row| wanted(options, &row.name));
    Ok(rows)
}
