//! The machine's own process: it boots and goes on standby, or it wakes, answers and verifies.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use dormouse_core::{ImageId, Name};
use dormouse_embed::{self as embed, Prefetch};
use dormouse_guest::{Guest, GuestParams, native::NativeGuest, park_and_pause};
use dormouse_minivm::{Dirty, MiniVm, Phase, VmShell, timeline::monotonic_now};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Kind,
    awake::{Awake, Marks},
    content, processes,
};
use crate::{
    context::{self, Context},
    failure::{Failure, Status},
};

const MIB: u64 = 1 << 20;
/// The machine's memory, unless its pages of pattern need more.
const MEMORY_BYTES: u64 = 128 * MIB;
/// Memory filled with bytes of this computer's files, behind the pattern.
const CONTENT_BYTES: u64 = 48 * MIB;
/// Guest code may be emulated, at a few microseconds an instruction.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
const SEED: u64 = 0x646f_726d_6f75_7365;
pub(super) const VCPU: &str = "vcpu";

/// The processes a demo is made of. Not for people.
#[derive(Debug, Subcommand)]
pub(crate) enum DemoGuestCommand {
    /// Boot a machine and put it on standby
    Boot(GuestArgs),
    /// Wake it, remember what it touches, put it on standby again
    Rehearse(GuestArgs),
    /// Wake it, report
    Wake(GuestArgs),
    /// Remove a demo's directory when the demo has ended
    Sweep {
        /// The directory
        dir: PathBuf,
    },
}

#[derive(Args, Debug)]
pub(crate) struct GuestArgs {
    /// The machine's name in the store
    #[arg(value_parser = context::name)]
    pub(super) name: Name,
    #[arg(long)]
    pub(super) pages: u64,
    #[arg(long)]
    pub(super) guest: Kind,
    /// The demo's process: the machine ends with it
    #[arg(long)]
    pub(super) parent: u32,
    /// When the request was made: nanoseconds of the monotonic clock
    #[arg(long)]
    pub(super) begun: u64,
}

/// How a wake went. Times are milliseconds since the request.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Woke {
    pub(crate) process: f64,
    pub(crate) open: f64,
    pub(crate) handshake: f64,
    pub(crate) first_instruction: f64,
    pub(crate) first_answer: f64,
    pub(crate) first_full_verified_pass: f64,
    pub(crate) faulted: u64,
    pub(crate) prefetched: u64,
    pub(crate) wrong: u64,
}

pub(crate) fn run(command: &DemoGuestCommand, context: &Context) -> Result<Status, Failure> {
    let (DemoGuestCommand::Boot(args) | DemoGuestCommand::Rehearse(args) | DemoGuestCommand::Wake(args)) =
        command
    else {
        let DemoGuestCommand::Sweep { dir } = command else { return Ok(Status::Failed) };
        return processes::sweep(dir).map(|()| Status::Done);
    };
    end_with_parent(args.parent)?;
    match command {
        DemoGuestCommand::Boot(_) => boot(args, context)?,
        DemoGuestCommand::Rehearse(_) => rehearse(args, context)?,
        _ => {
            let woke = wake(args, context)?;
            crate::output::print(true, &woke, |_| Ok(()))?;
        }
    }
    Ok(Status::Done)
}

/// Whatever ends the demo ends this process too.
fn end_with_parent(parent: u32) -> Result<(), Failure> {
    let signal = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(signal)).map_err(failed)?;
    // It may have ended before that.
    let now = rustix::process::getppid().map(|p| p.as_raw_nonzero().get().unsigned_abs());
    if now == Some(parent) { Ok(()) } else { Err(failed("the demo has ended")) }
}

pub(super) fn failed(why: impl std::fmt::Display) -> Failure {
    Failure::new("demo", why.to_string())
}

pub(super) fn params(args: &GuestArgs) -> Result<GuestParams, Failure> {
    GuestParams::new(args.pages, SEED).map_err(failed)
}

pub(super) fn regions(params: &GuestParams) -> [(GuestAddress, usize); 1] {
    let bytes = (params.memory_bytes() + CONTENT_BYTES).max(MEMORY_BYTES).next_multiple_of(2 * MIB);
    [(GuestAddress(0), bytes as usize)]
}

fn boot(args: &GuestArgs, context: &Context) -> Result<(), Failure> {
    let params = params(args)?;
    let memory = embed::memory(&regions(&params)).map_err(failed)?;
    let content = content::gather(CONTENT_BYTES as usize);
    memory.write_slice(&content, GuestAddress(params.memory_bytes())).map_err(failed)?;
    let mut guest: Box<dyn Guest> = match args.guest {
        Kind::Kvm => {
            let shell = VmShell::create().map_err(failed)?;
            Box::new(MiniVm::boot(shell, memory.clone(), &params, Dirty::Untracked).map_err(failed)?)
        }
        Kind::Process => Box::new(NativeGuest::boot(memory.clone(), &params, false).map_err(failed)?),
    };
    guest.resume().map_err(failed)?;
    guest.console().wait_for(b'.', 1, PATIENCE).map_err(failed)?;
    park_and_pause(&mut *guest, PATIENCE).map_err(failed)?;
    let sleep = embed::Sleep::new(args.name.clone()).state(vcpu()?, guest.save_state().map_err(failed)?);
    sleep.store(&context.open_store()?, &memory).map_err(failed)?;
    Ok(())
}

fn rehearse(args: &GuestArgs, context: &Context) -> Result<(), Failure> {
    let (mut machine, wrong) = Awake::wake(args, context, Prefetch::Nothing, true)?.watched()?;
    if wrong > 0 {
        return Err(failed("the machine found wrong pages"));
    }
    let runs = machine.woken.working_set().map_err(failed)?;
    let guest = &mut *machine.guest;
    park_and_pause(guest, PATIENCE).map_err(failed)?;
    let dirty = guest.take_dirty().map_err(failed)?.unwrap_or_default();
    let state = guest.save_state().map_err(failed)?;
    embed::Sleep::new(args.name.clone())
        .parent(args.name.clone())
        .dirty(dirty)
        .state(vcpu()?, state)
        .store(&machine.store, machine.woken.memory())
        .map_err(failed)?;
    embed::build_stream(&machine.store.open_snapshot(&args.name)?, &runs)?;
    Ok(())
}

fn wake(args: &GuestArgs, context: &Context) -> Result<Woke, Failure> {
    let (machine, wrong) = Awake::wake(args, context, Prefetch::WorkingSet, false)?.watched()?;
    let console = machine.guest.console();
    let counters = machine.woken.restore().counters();
    let begun = Duration::from_nanos(args.begun);
    // The first of two kinds of words: right or wrong.
    let said = |right, wrong| {
        let at = console.first(right).into_iter().chain(console.first(wrong)).min()?;
        Some(ms((monotonic_now() - begun).saturating_sub(at.elapsed())))
    };
    let Marks { process, open, handshake, first_instruction } = machine.marks;
    tracing::debug!(timeline = %machine.timeline, restore = ?machine.woken.restore().timeline(), ?counters, "awake");
    Ok(Woke {
        process: ms(process),
        open: ms(open),
        handshake: ms(handshake),
        first_instruction: ms(machine.timeline.at(Phase::FirstExit).unwrap_or(first_instruction)),
        first_answer: said(b'A', b'x').ok_or_else(|| failed("the machine gave no answer"))?,
        first_full_verified_pass: said(b'.', b'X').ok_or_else(|| failed("the machine verified nothing"))?,
        faulted: counters.faults,
        prefetched: counters.prefetched_pages,
        wrong,
    })
}

fn vcpu() -> Result<ImageId, Failure> {
    ImageId::new(VCPU).map_err(failed)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
