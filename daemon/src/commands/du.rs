//! `dormouse du`.

use std::io::{self, Write};

use clap::Args;
use dormouse_chunkstore::{Scatter, Usage, UsageReport};
use serde::Serialize;

use crate::{
    cli::values,
    context::Context,
    failure::{Failure, Status},
    human,
    table::Table,
};

/// What S3 Standard takes for a gigabyte (10^9 bytes) and month in us-east-1.
pub(crate) const S3_STANDARD_DOLLARS: &str = "0.023";

#[derive(Args, Debug)]
pub(crate) struct DuArgs {
    /// What the store takes for a gigabyte and month, in dollars
    #[arg(long, value_name = "DOLLARS_PER_GB_MONTH", default_value = S3_STANDARD_DOLLARS, value_parser = values::dollars)]
    price: f64,
}

#[derive(Debug, Serialize)]
struct Document {
    store: String,
    price_per_gb_month: f64,
    #[serde(flatten)]
    total: Priced,
    /// What garbage collection and repacking can win back.
    unreferenced_bytes: u64,
    snapshots: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    #[serde(flatten)]
    priced: Priced,
    /// Of `stored_bytes`, pages that no other snapshot shares.
    exclusive_bytes: u64,
    packs: u64,
    #[serde(flatten)]
    scatter: Scatter,
}

#[derive(Clone, Debug, Serialize)]
struct Priced {
    #[serde(flatten)]
    usage: Usage,
    dollars_per_month: f64,
}

/// Dollars a month for so many bytes.
pub(crate) fn dollars_per_month(stored_bytes: u64, price_per_gb_month: f64) -> f64 {
    stored_bytes as f64 / 1e9 * price_per_gb_month
}

pub(crate) fn run(args: &DuArgs, context: &Context) -> Result<Status, Failure> {
    let store = context.open_store()?;
    let document = document(store.url(), store.usage()?, args.price);
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

fn document(store: &str, report: UsageReport, price_per_gb_month: f64) -> Document {
    let priced = |usage: Usage| {
        let dollars_per_month = dollars_per_month(usage.stored_bytes, price_per_gb_month);
        Priced { usage, dollars_per_month }
    };
    let rows = report.snapshots.into_iter().map(|s| Row {
        name: s.name,
        priced: priced(s.usage),
        exclusive_bytes: s.exclusive_bytes,
        packs: s.packs,
        scatter: s.scatter,
    });
    Document {
        store: store.to_owned(),
        price_per_gb_month,
        snapshots: rows.collect(),
        total: priced(report.total),
        unreferenced_bytes: report.unreferenced_bytes,
    }
}

fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    let mut table = Table::new([
        "name",
        ">logical",
        ">non-zero",
        ">unique",
        ">stored",
        ">objects",
        ">packs/64M",
        ">reads/64M",
        ">a month",
    ]);
    let rows = d.snapshots.iter().map(|row| {
        let scattered =
            [row.scatter.packs_per_64_mib, row.scatter.reads_per_64_mib].map(|n| format!("{n:.1}"));
        (row.name.as_str(), &row.priced, scattered)
    });
    let total = ("all", &d.total, ["-".to_owned(), "-".to_owned()]);
    for (name, Priced { usage, dollars_per_month }, [packs, reads]) in rows.chain([total]) {
        table.row([
            name.to_owned(),
            human::bytes(usage.logical_bytes),
            human::bytes(usage.nonzero_bytes),
            human::bytes(usage.unique_bytes),
            human::bytes(usage.stored_bytes),
            usage.objects.to_string(),
            packs,
            reads,
            human::dollars(*dollars_per_month),
        ]);
    }
    write!(out, "{table}")?;
    let total = &d.total.usage;
    writeln!(
        out,
        "\nstored: {} of what is not zero",
        human::percent(total.stored_bytes, total.nonzero_bytes)
    )?;
    writeln!(out, "not needed by any snapshot: {}", human::bytes(d.unreferenced_bytes))?;
    writeln!(out, "what snapshots share is in the row of each that uses it, and in \"all\" once")
}
