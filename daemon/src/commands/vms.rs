//! `dormouse ps`, `dormouse stop` and `dormouse detach`: the VMs of the daemon.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use serde_json::{Value, json};

use super::standby::process_at;
use crate::{
    cli::values,
    client::{ControlArgs, MaybeDaemon},
    context::Context,
    failure::{Failure, Status},
    human,
    serve::api::{Nothing, StopRequest},
    table::Table,
};

/// How long a killed VM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args, Debug)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    /// The VM, as `dormouse ps` calls it
    #[arg(required_unless_present = "api_socket")]
    vm: Option<String>,

    /// The Firecracker that listens here, without asking a daemon
    #[arg(long, value_name = "PATH", conflicts_with = "vm")]
    api_socket: Option<PathBuf>,

    /// Ask the guest with Ctrl+Alt+Del first, and give it so long
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "0s",
          conflicts_with = "api_socket")]
    grace: Duration,

    #[command(flatten)]
    daemon: MaybeDaemon,
}

#[derive(Args, Debug)]
pub(crate) struct DetachArgs {
    /// The VM, as `dormouse ps` calls it
    vm: String,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn ps(args: &PsArgs, context: &Context) -> Result<Status, Failure> {
    let document: Value = args.control.find(context)?.get("/v1/vms")?;
    context.print(&document, |out| {
        let vms = document["vms"].as_array().map_or(&[][..], Vec::as_slice);
        if vms.is_empty() {
            return writeln!(out, "no VMs; `dormouse resume` wakes one");
        }
        let mut table = Table::new(["id", "state", ">pid", ">memory", ">faults", "since"]);
        for vm in vms {
            let text = |field: &str| vm[field].as_str().unwrap_or("-").to_owned();
            let number = |value: &Value| value.as_u64();
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let state = match vm["operation"].as_str() {
                Some(operation) => format!("{}, {operation}", text("state")),
                None => text("state"),
            };
            table.row([
                text("id"),
                state,
                or_dash(number(&vm["pid"]).map(|n| n.to_string())),
                or_dash(number(&vm["report"]["memory_bytes"]).map(human::bytes)),
                or_dash(number(&vm["report"]["counters"]["faults"]).map(|n| n.to_string())),
                or_dash(number(&vm["since_unix_ms"]).map(human::moment)),
            ]);
        }
        write!(out, "{table}")
    })?;
    Ok(Status::Done)
}

/// Where the daemon has a VM.
fn path_of(vm: &str) -> Result<String, Failure> {
    match vm.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && !vm.is_empty() {
        true => Ok(format!("/v1/vms/{vm}")),
        false => Err(Failure::new("no_such_vm", format!("no VM is called {vm:?}; `dormouse ps` lists them"))),
    }
}

pub(crate) fn stop(args: &StopArgs, context: &Context) -> Result<Status, Failure> {
    let document = match (&args.api_socket, &args.vm) {
        (Some(socket), _) => {
            let process = process_at(socket)?;
            let failed = |e: std::io::Error| Failure::new("vm", format!("ending it: {e}"));
            process.kill().map_err(failed)?;
            if !process.wait_ended(END_PATIENCE).map_err(failed)? {
                return Err(Failure::new("vm", "it was killed and does not end"));
            }
            json!({"pid": process.peer().pid, "state": "ended"})
        }
        (None, vm) => {
            let vm = vm.as_deref().unwrap_or_default();
            let request = StopRequest { grace_s: args.grace.as_secs() };
            match args.daemon.find(context)? {
                Some(client) => client.post(&format!("{}/stop", path_of(vm)?), &request)?,
                None => {
                    let message =
                        "no daemon is asked, and only one knows a VM by its name; give --api-socket";
                    return Err(Failure::new("no_daemon", message));
                }
            }
        }
    };
    context.print(&document, |out| writeln!(out, "process {} has ended", document["pid"]))?;
    Ok(Status::Done)
}

pub(crate) fn detach(args: &DetachArgs, context: &Context) -> Result<Status, Failure> {
    let client = args.control.find(context)?;
    let document: Value = client.post(&format!("{}/detach", path_of(&args.vm)?), &Nothing::default())?;
    context.print(&document, |out| writeln!(out, "{} needs the daemon no more", args.vm))?;
    Ok(Status::Done)
}
