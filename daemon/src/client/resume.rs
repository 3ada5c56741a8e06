//! `dormouse resume`, by the daemon: it wakes the VM and serves its memory.

use serde_json::Value;

use super::Client;
use crate::{
    commands::resume::{ResumeArgs, killed, print_text},
    context::Context,
    failure::{Failure, Status},
    machine::wake::Document,
    serve::api::{WakeRequest, absolute_from_here},
};

/// Only a report of what was served has to be waited for.
pub(crate) fn run(args: &ResumeArgs, context: &Context, client: &Client) -> Result<Status, Failure> {
    let mut vm: Value = client.post("/v1/vms", &request(args)?)?;
    let document = serde_json::from_value::<Document>(vm["resume"].take());
    let document = document.map_err(|e| Failure::new("daemon", format!("the daemon's answer: {e}")))?;
    context.print(&document, |out| print_text(out, &document))?;
    let Some(path) = &args.report else { return Ok(Status::Done) };
    let id = vm["id"].as_str().unwrap_or_default().to_owned();
    while !["ended", "failed"].contains(&vm["state"].as_str().unwrap_or_default()) {
        vm = client.get(&format!("/v1/vms/{id}?wait_s=600"))?;
    }
    let report = serde_json::to_vec_pretty(&vm["report"]).unwrap_or_default();
    std::fs::write(path, report).map_err(|e| Failure::file("writing", path, &e))?;
    match vm["report"]["killed_because"].as_str() {
        Some(why) => Err(killed(document.pid, why)),
        None => Ok(Status::Done),
    }
}

/// What the command line asks for, as the daemon is asked.
fn request(args: &ResumeArgs) -> Result<WakeRequest, Failure> {
    Ok(WakeRequest {
        id: None,
        snapshot: args.name.to_string(),
        firecracker: absolute_from_here(args.firecracker.as_deref())?,
        api_socket: absolute_from_here(args.api_socket.as_deref())?,
        console: absolute_from_here(args.console.as_deref())?,
        console_input: None,
        dirty_tracking: !args.no_dirty_tracking,
        older: args.older,
        policy: args.serving.policy,
        give_up_after_s: args.serving.give_up_after.as_secs(),
        prefetch: !args.serving.no_prefetch,
        record_window_s: args.serving.record_window.as_secs(),
    })
}
