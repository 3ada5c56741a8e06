//! `dormouse warm NAME`, `dormouse cool NAME`: what of a snapshot is kept on this host; and which tier that is.

use clap::Args;
use dormouse_chunkstore::{Store, Tier};
use dormouse_core::{Name, SnapshotId};
use serde::Serialize;

use super::standby::tracking;
use crate::{
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

#[derive(Args, Debug)]
pub(crate) struct TierArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,
}

#[derive(Debug, Serialize)]
struct Document {
    name: String,
    tier: &'static str,
    pinned: bool,
    /// Bytes of the stream on this host's disk.
    stored_bytes: u64,
}

/// Where a snapshot's first pages are, as seen from this host: "hot", "warm" or "cold".
pub(crate) fn tier_of(store: &Store, name: &Name, snapshot: SnapshotId) -> &'static str {
    // Without a directory for it, no process has said so, and none is made to find out.
    if context::runtime_dir().is_dir()
        && tracking().is_ok_and(|tracking| tracking.is_hot(&snapshot.to_string()))
    {
        return "hot";
    }
    match store.tier(name, snapshot) {
        Tier::Warm => "warm",
        Tier::Cold => "cold",
    }
}

pub(crate) fn warm(args: &TierArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    let Some(stored_bytes) = store.warm(&args.name)? else {
        let name = &args.name;
        return Err(Failure::new(
            "no_such_part",
            format!(
                "{name} has no resume stream that is current; `dormouse stream rebuild {name}` or `dormouse train {name}` makes one"
            ),
        ));
    };
    print(args, context, &store, stored_bytes)
}

pub(crate) fn cool(args: &TierArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    store.cool(&args.name);
    print(args, context, &store, 0)
}

fn print(args: &TierArgs, context: &Context, store: &Store, stored_bytes: u64) -> Result<Status, Failure> {
    let snapshot = store.open_snapshot(&args.name)?.reference().snapshot;
    let document = Document {
        name: args.name.to_string(),
        tier: tier_of(store, &args.name, snapshot),
        pinned: store.is_pinned(&args.name),
        stored_bytes,
    };
    context.print(&document, |out| {
        let pinned = if document.pinned { ", pinned" } else { "" };
        let bytes = human::bytes(document.stored_bytes);
        writeln!(out, "{} is {} on this host{pinned} ({bytes} on its disk)", document.name, document.tier)
    })?;
    Ok(Status::Done)
}
