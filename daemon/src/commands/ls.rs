//! `dormouse ls`.

use clap::Args;
use dormouse_chunkstore::{SnapshotSummary, Store};
use dormouse_core::{Name, SnapshotId};
use serde::Serialize;

use super::tier::tier_of;
use crate::{
    context::Context,
    failure::{Failure, Status},
    human,
    table::Table,
};

#[derive(Args, Debug)]
pub(crate) struct LsArgs {}

/// What `ls` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Document {
    store: String,
    snapshots: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    summary: SnapshotSummary,
    /// Where its first pages are, as seen from this host.
    tier: &'static str,
}

impl Document {
    pub(crate) fn of(store: &Store) -> Result<Self, Failure> {
        let row = |summary: SnapshotSummary| Row { tier: tier(store, &summary), summary };
        let snapshots = store.list()?.into_iter().map(row).collect();
        Ok(Document { store: store.url().to_owned(), snapshots })
    }

    /// Of a store that nothing was stored in yet.
    pub(crate) fn empty(store: &Store) -> Self {
        Document { store: store.url().to_owned(), snapshots: Vec::new() }
    }
}

pub(crate) fn run(_: &LsArgs, context: &Context) -> Result<Status, Failure> {
    let document = Document::of(&context.open_store()?)?;
    context.print(&document, |out| {
        if document.snapshots.is_empty() {
            return writeln!(out, "no snapshots in {}; `dormouse import` makes the first", document.store);
        }
        let mut table = Table::new(["name", ">size", ">non-zero", "created", "tier", "snapshot"]);
        for Row { summary: s, tier } in &document.snapshots {
            table.row([
                s.name.clone(),
                human::bytes(s.logical_bytes),
                human::bytes(s.nonzero_bytes),
                if s.damaged.is_some() { "damaged".into() } else { human::moment(s.created_unix_ms) },
                (*tier).into(),
                s.snapshot.chars().take(12).collect(),
            ]);
        }
        write!(out, "{table}")?;
        for (name, why) in damaged(&document.snapshots) {
            writeln!(out, "{name}: {why}")?;
        }
        Ok(())
    })?;
    Ok(Status::Done)
}

fn damaged(rows: &[Row]) -> impl Iterator<Item = (&str, &str)> {
    rows.iter().filter_map(|row| Some((row.summary.name.as_str(), row.summary.damaged.as_deref()?)))
}

fn tier(store: &Store, summary: &SnapshotSummary) -> &'static str {
    match (Name::new(&summary.name), SnapshotId::from_hex(&summary.snapshot)) {
        (Ok(name), Some(snapshot)) => tier_of(store, &name, snapshot),
        _ => "cold",
    }
}
