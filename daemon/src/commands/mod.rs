//! One file per command. Each does its work, then prints once: nothing, or one document.

pub(crate) mod attach;
pub(crate) mod bench;
pub(crate) mod cloud_hypervisor;
pub(crate) mod demo;
pub(crate) mod du;
pub(crate) mod export;
pub(crate) mod gc;
pub(crate) mod hold;
pub(crate) mod import;
pub(crate) mod interruption;
pub(crate) mod keeping;
pub(crate) mod key;
mod leased;
pub(crate) mod ls;
mod newer_guest;
pub(crate) mod repack;
pub(crate) mod resume;
pub(crate) mod resume_kept;
pub(crate) mod rm;
pub(crate) mod serve;
pub(crate) mod serve_uffd;
pub(crate) mod show;
mod spool;
pub(crate) mod standby;
mod standby_choice;
mod standby_document;
mod standby_flow;
pub(crate) mod stream;
pub(crate) mod tier;
pub(crate) mod train;
pub(crate) mod unfinished;
pub(crate) mod verify;
pub(crate) mod vms;

use self::resume::ResumeCommand;
use crate::{
    cli::args::Command,
    context::Context,
    failure::{Failure, Status},
};

/// Runs a command.
pub(crate) fn run(command: Command, context: &Context) -> Result<Status, Failure> {
    match command {
        Command::Hold(args) => hold::run(args, context),
        Command::Import(args) => import::run(args, context),
        Command::Attach(args) => attach::run(&args, context),
        Command::Export(args) => export::run(&args, context),
        Command::Ls(args) => ls::run(&args, context),
        Command::Show(args) => show::run(&args, context),
        Command::Bench(args) => bench::run(&args, context),
        Command::Demo(args) => demo::run(&args, context),
        Command::DemoGuest(command) => demo::guest::run(&command, context),
        Command::Du(args) => du::run(&args, context),
        Command::Verify(args) => verify::run(&args, context),
        Command::Rm(args) => rm::run(&args, context),
        Command::Gc(args) => gc::run(&args, context),
        Command::Repack(args) => repack::run(&args, context),
        Command::Serve(args) => serve::run(args, context),
        Command::Ps(args) => vms::ps(&args, context),
        Command::Stop(args) => vms::stop(&args, context),
        Command::Detach(args) => vms::detach(&args, context),
        Command::ServeUffd(args) => serve_uffd::run(&args, context),
        Command::Resume(ResumeCommand::Firecracker(args)) => resume::run(args, context),
        Command::Resume(ResumeCommand::CloudHypervisor(args)) => {
            cloud_hypervisor::resume::run(&args, context)
        }
        Command::Standby(command) => standby::run(&command, context),
        Command::Stream(command) => stream::run(&command, context),
        Command::Warm(args) => tier::warm(&args, context),
        Command::Cool(args) => tier::cool(&args, context),
        Command::Train(args) => train::run(&args, context),
        Command::Key(command) => key::run(&command, context),
    }
}
