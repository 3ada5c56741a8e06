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

#[derive(Serialize)]
struct Document<'a> {
    store: &'a str,
    snapshots: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    summary: &'a SnapshotSummary,
    /// Where its first pages are, as seen from this host.
    tier: &'static str,
}

pub(crate) fn run(_: &LsArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    let snapshots = store.list()?;
    let rows = snapshots.iter().map(|summary| Row { summary, tier: tier(&store, summary) }).collect();
    let document = Document { store: store.url(), snapshots: rows };
    context.print(&document, |out| {
        if snapshots.is_empty() {
            return writeln!(out, "no snapshots in {}; `dormouse import` makes the first", store.url());
        }
        let mut table = Table::new(["name", ">size", ">non-zero", "created", "tier", "snapshot"]);
        for Row { summary: s, tier } in &document.snapshots {
            table.row([
                s.name.clone(),
                human::bytes(s.logical_bytes),
                human::bytes(s.nonzero_bytes),
                human::moment(s.created_unix_ms),
                (*tier).into(),
                s.snapshot.chars().take(12).collect(),
            ]);
        }
        write!(out, "{table}")
    })?;
    Ok(Status::Done)
}

fn tier(store: &Store, summary: &SnapshotSummary) -> &'static str {
    match (Name::new(&summary.name), SnapshotId::from_hex(&summary.snapshot)) {
        (Ok(name), Some(snapshot)) => tier_of(store, &name, snapshot),
        _ => "cold",
    }
}
