//! Dormouse linked into a VMM: a machine boots, goes on standby, and wakes with its pages on demand.
//!
//! `cargo run --release -p dormouse-embed --example embed` needs `/dev/kvm` and userfaultfd.

use std::{error::Error, thread, time::Duration};

use dormouse_chunkstore::{Store, StoreOptions};
use dormouse_core::{ImageId, Name};
use dormouse_embed as embed;
use dormouse_guest::{Command, Guest, GuestParams, park_and_pause};
use dormouse_minivm::{Dirty, MiniVm, VmShell};
use dormouse_restore::VmStopped;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const PATIENCE: Duration = Duration::from_secs(60);
const REGIONS: [(GuestAddress, usize); 1] = [(GuestAddress(0), 64 << 20)];

/// The twenty lines, the first half: a paused machine goes into the store.
fn standby(store: &Store, name: &Name, vm: &mut MiniVm) -> Result<(), Box<dyn Error>> {
    let state = vm.save_state()?;
    // What `embed::memory` made is read in place; other memory would be copied first.
    let sleep = embed::Sleep::new(name.clone()).state(ImageId::new("vcpu")?, state);
    let report = sleep.store(store, vm.memory())?;
    // Durable from here on: this process could end.
    println!("standby: {} bytes of memory, {} stored", report.logical_bytes, report.stored_bytes);
    Ok(())
}

/// The twenty lines, the second half: the machine is back before its memory is.
fn wake(store: &Store, name: &Name) -> Result<(MiniVm, embed::Woken), Box<dyn Error>> {
    // The VM itself needs nothing of the snapshot: create it meanwhile.
    let shell = thread::spawn(VmShell::create);
    // For any number of machines: from the second on, first pages stay decoded in memory.
    let template = embed::Template::open(store, name, embed::Keep::AsNeeded)?;
    // Memory whose absent pages fault to Dormouse, which has begun to bring them in.
    let woken = template.wake(&REGIONS, embed::Wake::default())?;
    let state = template.state("vcpu")?;
    let shell = shell.join().map_err(|_| "creating the VM panicked")??;
    let mut vm = MiniVm::restore(shell, woken.memory().clone(), &state, Dirty::Tracked)?;
    vm.send(Command::Answer);
    vm.resume()?;
    Ok((vm, woken))
}

fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path().to_str().ok_or("not UTF-8")?, StoreOptions::default())?;
    let name = Name::new("machine")?;

    let memory: GuestMemoryMmap = embed::memory(&REGIONS)?;
    let mut vm = MiniVm::boot(VmShell::create()?, memory, &GuestParams::new(4096, 1)?, Dirty::Untracked)?;
    vm.resume()?;
    vm.console().wait_for(b'.', 1, PATIENCE)?;
    park_and_pause(&mut vm, PATIENCE)?;
    standby(&store, &name, &mut vm)?;
    drop(vm);

    let (vm, woken) = wake(&store, &name)?;
    vm.console().wait_for(b'.', 1, PATIENCE)?;
    println!(
        "awake: the machine said {:?}, wrong pages: {}",
        vm.console().text(),
        vm.console().wrong_total()
    );
    drop(vm);
    let counters = woken.end(VmStopped::attest());
    println!("pages: {} faulted, {} prefetched", counters.faults, counters.prefetched_pages);
    Ok(())
}
