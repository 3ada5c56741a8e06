//! The command line as a whole: options that hold for all commands, and the list of commands.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::commands::{
    attach, bench, demo, du, export, gc, hold, import, key, ls, repack, resume, rm, serve, serve_uffd, show,
    standby, stream, tier, train, verify, vms,
};

/// Stores virtual-machine snapshots densely and brings them back fast.
#[derive(Debug, Parser)]
#[command(name = "dormouse", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalOptions,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that may be written before or after any command.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalOptions {
    /// Where the snapshots are: a directory, file:///path, memory://, s3://bucket/prefix, gs://bucket/prefix or
    /// az://container/prefix [default: ~/.local/share/dormouse]
    #[arg(long, global = true, value_name = "URL", env = "DORMOUSE_STORE")]
    pub(crate) store: Option<String>,

    /// Print exactly one JSON document on standard output, also for errors
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Encrypt and decrypt with the key in this file: 64 hexadecimal digits, or 32 bytes
    /// [env: DORMOUSE_KEY_FILE; or the key itself in DORMOUSE_KEY]
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "key_command")]
    pub(crate) key_file: Option<PathBuf>,

    /// Encrypt and decrypt with the key that this shell command prints
    #[arg(long, global = true, value_name = "COMMAND")]
    pub(crate) key_command: Option<String>,

    /// Store without encryption, also where a store has keys
    #[arg(long, global = true, conflicts_with_all = ["key_file", "key_command"])]
    pub(crate) no_encryption: bool,

    /// Where this host keeps what it can rebuild, so that it need not be fetched again [default: ~/.cache/dormouse]
    #[arg(long, global = true, value_name = "PATH", env = "DORMOUSE_CACHE_DIR")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// No progress bars
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,

    /// Say more on standard error; twice for still more
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Store memory, disks and device state as a snapshot
    Import(import::ImportArgs),
    /// Write a snapshot's memory, disks and device state to files, byte-identical and sparse
    Export(export::ExportArgs),
    /// Serve a disk of a snapshot over NBD: read as it is asked for, writes kept in an overlay
    Attach(attach::AttachArgs),
    /// List the snapshots
    Ls(ls::LsArgs),
    /// Show what a snapshot holds
    Show(show::ShowArgs),
    /// Show what the snapshots take up, and what that costs a month
    Du(du::DuArgs),
    /// Check that what is stored is there and undamaged; exit code 1 if not
    Verify(verify::VerifyArgs),
    /// Remove a snapshot's name; `gc` then frees what only it used
    Rm(rm::RmArgs),
    /// Free what no snapshot uses any more
    Gc(gc::GcArgs),
    /// Rewrite wasteful packs and compress them harder, without changing any snapshot
    Repack(repack::RepackArgs),
    /// Measure how fast Dormouse is on this machine, against what the hardware allows
    Bench(bench::BenchArgs),
    /// Show it all: boot a machine, put it on standby, wake it 20 times and let it verify its memory
    Demo(demo::DemoArgs),
    #[command(subcommand, hide = true)]
    DemoGuest(demo::guest::DemoGuestCommand),
    /// Serve many VMs from one process, controlled over HTTP on a Unix socket
    Serve(serve::ServeArgs),
    /// List the VMs of the daemon
    #[command(visible_alias = "vms")]
    Ps(vms::PsArgs),
    /// End a VM
    Stop(vms::StopArgs),
    /// Install all memory of a VM, so that it needs the daemon no more
    Detach(vms::DetachArgs),
    /// Serve the memory of Firecracker VMs from a snapshot, page by page, over its userfaultfd handshake
    ServeUffd(serve_uffd::ServeUffdArgs),
    /// Hold the descriptors of VMs for those who serve them, so that they can be restarted; started by them
    Hold(hold::HoldArgs),
    /// Wake a VM from the store
    #[command(subcommand)]
    Resume(resume::ResumeCommand),
    /// Put a running VM on standby: into the store, and out of this host
    #[command(subcommand)]
    Standby(standby::StandbyCommand),
    /// Make or remove a snapshot's resume stream: what its machine touches first, in one object
    #[command(subcommand)]
    Stream(stream::StreamCommand),
    /// Let a throw-away clone of a snapshot run for a moment, and make the resume stream from what it touches
    Train(train::TrainArgs),
    /// Bring a snapshot's resume stream to this host's disk, and keep it there
    Warm(tier::TierArgs),
    /// Take a snapshot's resume stream off this host's disk; the store keeps it
    Cool(tier::TierArgs),
    /// Make and look at encryption keys
    #[command(subcommand)]
    Key(key::KeyCommand),
}
