//! `dormouse demo`: a machine goes on standby and wakes again and again, each wake verified by the machine itself.
//!
//! | file | holds |
//! |---|---|
//! | `guest` | the hidden command that runs as a process of its own: the machine booting, or waking |
//! | `awake` | a machine that has been woken, in that process |
//! | `content` | bytes of this computer's own files, to fill guest memory with something real |
//! | `processes` | starting those processes, and leaving nothing behind |
//! | `report` | what was measured, as a document and as text |

mod awake;
mod content;
pub(crate) mod guest;
mod processes;
mod report;

use std::io::IsTerminal as _;

use clap::{Args, ValueEnum};
use dormouse_chunkstore::{Store, Usage};
use dormouse_guest::GuestParams;
use dormouse_restore::{Uffd, UffdOptions};
use serde::{Deserialize, Serialize};

use self::{
    processes::{Machine, Place},
    report::Report,
};
use crate::{
    cli::values,
    commands::du::{S3_STANDARD_DOLLARS, dollars_per_month},
    context::Context,
    failure::{Failure, Status},
};

#[derive(Args, Debug)]
pub(crate) struct DemoArgs {
    /// How often to wake the machine
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// Pages of 4 KiB that the machine writes, and verifies on each wake: a multiple of 8, at least 256
    #[arg(long, default_value_t = 4096)]
    pages: u64,

    /// What the store takes for a gigabyte and month, in dollars
    #[arg(long, value_name = "DOLLARS_PER_GB_MONTH", default_value = S3_STANDARD_DOLLARS, value_parser = values::dollars)]
    price: f64,

    /// What the machine runs on [default: kvm where it is there]
    #[arg(long, hide = true)]
    guest: Option<Kind>,
}

/// What the machine runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A virtual machine on `/dev/kvm`.
    Kvm,
    /// A process that does the same work.
    Process,
}

pub(crate) fn run(args: &DemoArgs, context: &Context) -> Result<Status, Failure> {
    GuestParams::new(args.pages, 0).map_err(|e| Failure::usage(format!("--pages: {e}")))?;
    let kind = args.guest.unwrap_or_else(find_guest);
    // Before anything is booted: without it no machine can wake.
    let options = UffdOptions { remove_events: false, kernel_faults: kind == Kind::Kvm };
    Uffd::create(options).map_err(|e| Failure::new("userfaultfd", e.to_string()))?;

    let say = |what: &str| {
        if !context.global().quiet && std::io::stderr().is_terminal() {
            eprintln!("{what}");
        }
    };
    let place = Place::new(context)?;
    let machine = Machine { place: &place, kind, pages: args.pages };
    say("booting a machine and putting it on standby ...");
    machine.boot()?;
    say("waking it once to learn what it touches first, and putting it on standby again ...");
    machine.rehearse()?;
    say("waking it ...");
    let wakes = (0..args.runs).map(|_| machine.wake()).collect::<Result<Vec<_>, _>>()?;

    let usage = stored(&place)?;
    let dollars = dollars_per_month(usage.stored_bytes, args.price);
    let report = Report::new(kind, &usage, args.price, dollars, &wakes);
    context.print(&report, |out| report.print_text(out))?;
    Ok(if report.all_right() { Status::Done } else { Status::Failed })
}

/// KVM if it can be used; says on standard error if not.
fn find_guest() -> Kind {
    let instead = "a process takes the place of the virtual machine";
    if dormouse_guest::program().is_none() {
        eprintln!("note: the demo's guest program is x86-64 code, so {instead}");
        return Kind::Process;
    }
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Kind::Kvm,
        Err(why) => {
            eprintln!(
                "note: /dev/kvm cannot be used ({why}), so {instead}; for a virtual machine, enable \
                 virtualisation and give this user access, as by `sudo usermod -aG kvm $USER`"
            );
            Kind::Process
        }
    }
}

/// What the machine takes in the store: all there is in a store made for it alone.
fn stored(place: &Place) -> Result<Usage, Failure> {
    let store: Store = place.context().open_store()?;
    let report = store.usage()?;
    let own = report.snapshots.into_iter().find(|s| s.name == place.name().as_str());
    let mut usage = own.map(|s| s.usage).unwrap_or_default();
    if place.is_temporary() {
        usage.stored_bytes = report.total.stored_bytes;
    }
    Ok(usage)
}
