//! `dormouse ls`.

use clap::Args;
use dormouse_chunkstore::SnapshotSummary;
use serde::Serialize;

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
    snapshots: &'a [SnapshotSummary],
}

pub(crate) fn run(_: &LsArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    let snapshots = store.list()?;
    let document = Document { store: store.url(), snapshots: &snapshots };
    context.print(&document, |out| {
        if snapshots.is_empty() {
            return writeln!(out, "no snapshots in {}; `dormouse import` makes the first", store.url());
        }
        let mut table = Table::new(["name", ">size", ">non-zero", "created", "snapshot"]);
        for s in &snapshots {
            table.row([
                s.name.clone(),
                human::bytes(s.logical_bytes),
                human::bytes(s.nonzero_bytes),
                human::moment(s.created_unix_ms),
                s.snapshot.chars().take(12).collect(),
            ]);
        }
        write!(out, "{table}")
    })?;
    Ok(Status::Done)
}
