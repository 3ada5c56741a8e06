//! `dormouse key`: make keys, look at them, rotate them.

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
    /// Show the public identifier of the key in use
    Id,
    /// List the keys that the store knows
    List,
    /// Let another key open what the key in use opens. Nothing that is stored is written anew
    Rotate {
        /// The new key: a file with 64 hexadecimal digits, or 32 bytes
        #[arg(long, value_name = "PATH")]
        new_key_file: PathBuf,

        /// Take the key in use out of use: it opens nothing any more
        #[arg(long)]
        drop_old: bool,
    },
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
        KeyCommand::List => {
            let list = context.open_store()?.key_list()?;
            context.print(&list, |out| {
                for key in &list.keys {
                    writeln!(out, "{}{}", key.key_id, if key.in_use { "  (in use)" } else { "" })?;
                }
                match &list.domain {
                    Some(domain) => writeln!(out, "the key in use opens domain {domain}"),
                    None => Ok(()),
                }
            })?;
        }
        KeyCommand::Rotate { new_key_file, drop_old } => {
            let new = key::from_file(new_key_file)?;
            let report = context.open_store()?.rotate_key(&new, *drop_old)?;
            context.print(&report, |out| {
                writeln!(out, "key {} opens domain {} now", report.new_key_id, report.domain)?;
                match report.dropped_old {
                    true => writeln!(out, "key {} opens nothing any more", report.old_key_id),
                    false => writeln!(out, "key {} still does; --drop-old ends that", report.old_key_id),
                }
            })?;
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
