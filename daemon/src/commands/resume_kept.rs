//! `resume firecracker --keep`, started again: goes on with the VM that it woke before.

use std::{path::Path, sync::Arc, time::Instant};

use dormouse_firecracker::{ApiClient, Session, machine};
use dormouse_keeper::Keeper;

use super::{
    keeping::{TakenUp, take_up},
    resume::ResumeArgs,
    standby::{API_PATIENCE, micros},
};
use crate::{
    context::Context,
    failure::Failure,
    machine::wake::{Document, Phase},
};

/// The keeper, if one is asked for.
pub(super) fn keeper(args: &ResumeArgs) -> Result<Option<Arc<dyn Keeper>>, Failure> {
    match (&args.keep.keep, &args.api_socket) {
        (None, _) => Ok(None),
        // Whoever goes on with the VM must find its API where it was.
        (Some(_), None) => Err(Failure::usage("--keep goes with --api-socket: its next server looks there")),
        (Some(_), Some(api_socket)) => args.keep.keeper(api_socket),
    }
}

/// The VM that an earlier process woke from the same snapshot's name, and that nobody serves.
pub(super) fn vm(
    args: &ResumeArgs,
    keeper: &Arc<dyn Keeper>,
    context: &Context,
) -> Result<Option<(Document, Session)>, Failure> {
    let begun = Instant::now();
    let taken_up = take_up(keeper, &context.open_store()?, args.serving.options())?;
    let of_name = |vm: &TakenUp| vm.snapshot.reference().name == args.name;
    // Others are served as well, for as long as this process is there.
    let Some(TakenUp { session, snapshot }) = taken_up.into_iter().find(of_name) else { return Ok(None) };
    let api_socket = args.api_socket.clone().unwrap_or_default();
    tell_of_pause(&api_socket);
    let taken_us = micros(begun.elapsed());
    let document = Document {
        name: args.name.to_string(),
        snapshot: snapshot.reference().snapshot.to_string(),
        pid: session.process().peer().pid,
        api_socket,
        stream_pages: None,
        resumed_us: taken_us,
        phases: vec![Phase { name: "taken up".into(), at_us: taken_us }],
    };
    Ok(Some((document, session)))
}

/// A guest that stands still is left to whoever paused it: a standby may be under way. If nobody did, its earlier server
/// was ended before it could let it go on.
fn tell_of_pause(api_socket: &Path) {
    if let Ok(false) = machine::is_running(&ApiClient::new(api_socket, API_PATIENCE)) {
        tracing::warn!("the guest is paused; `PATCH /vm` with {{\"state\": \"Resumed\"}} lets it go on");
    }
}
