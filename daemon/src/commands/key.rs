//! `dormouse key generate` and `dormouse key id`.

use std::{
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use dormouse_core::DomainKey;
use serde_json::json;

use crate::{
    context::Context,
    failure::{Failure, Status},
    key,
};

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key. Whoever loses it loses every snapshot stored with it
    Generate {
        /// Write it to this new file, readable by its owner only, rather than to standard output
        #[arg(long, value_name = "PATH")]
        out: Option<PathBuf>,
    },
    /// Show the public identifier of the key in use: the folder its snapshots are under
    Id,
}

pub(crate) fn run(command: &KeyCommand, context: &Context) -> Result<Status, Failure> {
    match command {
        KeyCommand::Generate { out } => generate(out.as_deref(), context)?,
        KeyCommand::Id => {
            let key = key::find(context.global())?.ok_or_else(|| {
                Failure::usage("no key is given; pass --key-file or set DORMOUSE_KEY_FILE or DORMOUSE_KEY")
            })?;
            let id = key.id().to_string();
            context.print(&json!({ "key_id": id }), |out| writeln!(out, "{id}"))?;
        }
    }
    Ok(Status::Done)
}

fn generate(out: Option<&Path>, context: &Context) -> Result<(), Failure> {
    let key = key::generate()?;
    let (id, hex) = (key.id().to_string(), key::to_hex(&key));
    let Some(path) = out else {
        return context.print(&json!({ "key_id": id, "key": hex }), |out| writeln!(out, "{hex}"));
    };
    write_new(path, &key).map_err(|e| Failure::file("writing the new key file", path, &e))?;
    context.print(&json!({ "key_id": id, "path": path }), |out| {
        writeln!(
            out,
            "wrote {}, key id {id}\nKeep a copy in a safe place: without it the snapshots are lost.",
            path.display()
        )
    })
}

/// A key file is never overwritten: the old key may be the only way to somebody's snapshots.
fn write_new(path: &Path, key: &DomainKey) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{}", key::to_hex(key))?;
    file.sync_all()
}
