//! Dormouse inside a VMM of one's own: putting a machine on standby, and waking it with its pages on demand.
//!
//! All of it is in `vm-memory`'s types. `examples/embed.rs` is a whole program; its core is this:
//!
//! ```no_run
//! # use std::{error::Error, thread};
//! # use dormouse_chunkstore::{Store, StoreOptions};
//! # use dormouse_core::{ImageId, Name};
//! # use dormouse_embed as embed;
//! # use dormouse_guest::Guest;
//! # use dormouse_minivm::{Dirty, MiniVm, VmShell};
//! # use vm_memory::GuestAddress;
//! # fn demo(mut vm: MiniVm) -> Result<(), Box<dyn Error>> {
//! let store = Store::open("file:///var/lib/dormouse", StoreOptions::default())?;
//! let (name, vcpu) = (Name::new("machine")?, ImageId::new("vcpu")?);
//!
//! vm.pause()?; // standby: memory and device state go into the store, then the machine may end
//! embed::Sleep::new(name.clone()).state(vcpu, vm.save_state()?).store(&store, vm.memory())?;
//! drop(vm);
//!
//! let shell = thread::spawn(VmShell::create); // needs no memory: done while the snapshot opens
//! let template = embed::Template::open(&store, &name, embed::Keep::AsNeeded)?; // for one machine or many
//! let woken = template.wake(&[(GuestAddress(0), 128 << 20)], embed::Wake::default())?;
//! let shell = shell.join().map_err(|_| "no VM")??;
//! let mut vm = MiniVm::restore(shell, woken.memory().clone(), &template.state("vcpu")?, Dirty::Tracked)?;
//! vm.resume()?; // runs at once; pages come as it touches them
//! # Ok(()) }
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `memory.rs` | guest memory that can be stored without a copy, and where its pages lie in the image |
//! | `sleep.rs` | [`Sleep`]: guest memory and device state into a store |
//! | `template.rs` | [`Template`]: a snapshot for any number of machines, its first pages in memory, on disk or in the store |
//! | `wake.rs` | [`wake`]: a snapshot becomes guest memory served by a userfaultfd |
//!
//! All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

mod memory;
mod sleep;
#[expect(unsafe_code, reason = "guest memory is handed to vm-memory by address")]
mod sys;
mod template;
mod wake;

pub use dormouse_vmm_common::DirtyRun;
pub use dormouse_wake::{
    MEMORY_ID, WORKING_SET_ID, WorkingSetError, build_stream, decode_working_set, stored_working_set,
};
pub use memory::memory;
pub use sleep::{Sleep, SleepError};
pub use template::{Keep, Template, Tier};
pub use wake::{ImproveError, Install, Prefetch, Wake, WakeError, Woken, wake, wake_resume};
