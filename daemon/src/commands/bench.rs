//! `dormouse bench`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use dormouse_benches::{Options, Row};
use serde::Serialize;

use crate::{
    context::Context,
    failure::{Failure, Status},
    table::Table,
};

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// Measure only rows whose names begin so
    #[arg(long, value_name = "NAME")]
    row: Option<String>,

    /// Fewer repetitions and smaller sets, for a first look
    #[arg(long)]
    quick: bool,

    /// Measure with this guest's memory, raw [default: 2-work.mem in DORMOUSE_VMSET, or programs of this machine]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Document {
    cores: usize,
    quick: bool,
    rows: Vec<Row>,
}

pub(crate) fn run(args: &BenchArgs, context: &Context) -> Result<Status, Failure> {
    let options = Options { image: args.image.clone(), quick: args.quick, only: args.row.clone() };
    let rows = dormouse_benches::run(&options, |what| tracing::info!(what, "measuring"));
    let rows = rows.map_err(|why| Failure::new("bench", why.to_string()))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let document = Document { cores, quick: args.quick, rows };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

fn print_text(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    let mut table = Table::new(["row", ">measured", ">floor", "unit", ">ratio", ">target", "met"]);
    for row in &document.rows {
        table.row([
            row.name.clone(),
            format!("{:.1}", row.value),
            format!("{:.1}", row.floor),
            row.unit.into(),
            format!("{:.2}", row.ratio),
            row.target.map_or_else(|| "-".into(), |t| format!("{t:.2}")),
            row.met.map_or("-", |met| if met { "yes" } else { "no" }).into(),
        ]);
    }
    writeln!(out, "{} cores; medians, both sides measured in turns\n", document.cores)?;
    writeln!(out, "{table}")?;
    for row in &document.rows {
        writeln!(out, "{}: {}", row.name, dormouse_benches::legend(&row.name))?;
    }
    Ok(())
}
