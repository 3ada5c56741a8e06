//! Verify: what is damaged, and whom it hurts; and, if asked, what of it can be had back.

mod examine;
mod lost;
mod packs;
mod remap;
mod repair;
mod unreadable;
mod work;

pub use self::lost::Source;
pub use self::repair::{RepairOptions, RepairReport, Repaired};
pub use self::unreadable::{Unreadable, UnreadableKind};

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dormouse_core::{FrameRef, Name, PackId, PackRef, Reference, pack::FrameKind};
use serde::Serialize;

use crate::{
    error::{Result, StoreError},
    progress::Progress,
    store::Store,
};

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyDepth {
    /// References, roots, page maps, and that every pack is there at its size.
    Structure,
    /// Also every byte of every pack, decoded, and every page against its id.
    Content,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's key.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
    /// The snapshots that cannot be restored whole because of it.
    pub hurts: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VerifyReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Objects looked at.
    pub objects: u64,
    /// Bytes read and checked.
    pub checked_bytes: u64,
    /// What is wrong; empty if nothing is.
    pub damages: Vec<Damage>,
    /// What cannot be read, and so was not checked; empty if everything can.
    pub unreadable: Vec<Unreadable>,
}

impl VerifyReport {
    /// Whether nothing is wrong, and everything was checked.
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty() && self.unreadable.is_empty()
    }
}

/// A frame that snapshots need.
#[derive(Debug)]
struct Need {
    at: FrameRef,
    kind: FrameKind,
    /// Indices of the snapshots.
    who: BTreeSet<usize>,
}

/// A pack, and the frames of it that snapshots need, by offset.
#[derive(Debug)]
struct Wanted {
    pack: PackRef,
    frames: BTreeMap<u32, Need>,
}

impl Wanted {
    fn everyone(&self) -> BTreeSet<usize> {
        self.frames.values().flat_map(|need| need.who.iter().copied()).collect()
    }
}

/// What there is, what of it is needed, and what is wrong with it.
#[derive(Default)]
struct Examination {
    report: VerifyReport,
    findings: Findings,
    /// Of all snapshots, those included that cannot be read.
    names: Vec<String>,
    /// Those that can be read, by index into `names`.
    references: BTreeMap<usize, Reference>,
    wanted: HashMap<PackId, Wanted>,
}

impl Examination {
    /// Packs with which anything is wrong. What cannot be read is left alone.
    fn bad_packs(&self) -> BTreeSet<PackId> {
        let objects = self.findings.damages.keys().map(|(object, _)| object);
        let objects = objects.filter(|object| !self.findings.unreadable.contains_key(*object));
        let packs = objects.filter(|object| object.contains("/packs/"));
        packs.filter_map(|object| PackId::from_hex(object.rsplit('/').next()?)).collect()
    }

    fn finish(mut self) -> VerifyReport {
        let name = |i: usize| self.names.get(i).cloned();
        let names = |hurts: BTreeSet<usize>| hurts.into_iter().filter_map(name).collect();
        let damages = self.findings.damages.into_iter();
        self.report.damages =
            damages.map(|((object, why), hurts)| Damage { object, why, hurts: names(hurts) }).collect();
        let unreadable = self.findings.unreadable.into_iter();
        self.report.unreadable = unreadable
            .map(|(object, (kind, why, hurts))| Unreadable { object, kind, why, hurts: names(hurts) })
            .collect();
        self.report
    }
}

#[derive(Default)]
struct Findings {
    /// (object, why) -> indices of snapshots.
    damages: BTreeMap<(String, String), BTreeSet<usize>>,
    /// object -> why it cannot be read, and indices of snapshots.
    unreadable: BTreeMap<String, (UnreadableKind, String, BTreeSet<usize>)>,
}

impl Findings {
    fn merge(&mut self, other: Findings) {
        for (damage, hurts) in other.damages {
            self.damages.entry(damage).or_default().extend(hurts);
        }
        for (object, (kind, why, hurts)) in other.unreadable {
            self.unreadable.entry(object).or_insert((kind, why, BTreeSet::new())).2.extend(hurts);
        }
    }

    fn add(&mut self, object: &str, why: &dyn std::fmt::Display, hurts: impl IntoIterator<Item = usize>) {
        self.damages.entry((object.to_owned(), why.to_string())).or_default().extend(hurts);
    }
}

impl Store {
    /// Checks one snapshot or all of them, and with all of them also objects that nothing refers to. Reports what is
    /// wrong, or cannot be read, and goes on; fails only where the store as a whole cannot be read.
    pub fn verify(
        &self,
        name: Option<&Name>,
        depth: VerifyDepth,
        progress: &dyn Progress,
    ) -> Result<VerifyReport> {
        Ok(self.examine(name, depth, progress, &mut || Ok(()))?.finish())
    }
}

/// The reason alone, where the message names the object as well.
fn reason(error: &StoreError) -> String {
    match error {
        StoreError::Damaged { why, .. } => why.to_string(),
        StoreError::Missing { .. } => "it is missing".into(),
        other => other.to_string(),
    }
}
