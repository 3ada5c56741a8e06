//! `dormouse rm NAME`.

use clap::Args;
use dormouse_core::Name;
use serde_json::json;

use crate::{
    context::{self, Context},
    failure::{Failure, Status},
};

#[derive(Args, Debug)]
pub(crate) struct RmArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,
}

pub(crate) fn run(args: &RmArgs, context: &Context) -> Result<Status, Failure> {
    context.open_store()?.remove(&args.name)?;
    let name = args.name.as_str();
    context.print(&json!({ "removed": name }), |out| {
        writeln!(out, "removed {name}; `dormouse gc` frees what only it used")
    })?;
    Ok(Status::Done)
}
