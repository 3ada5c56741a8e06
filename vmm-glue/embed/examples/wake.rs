//! Boots the guest, parks it, and wakes it in new processes, printing where the time goes. Pages come from a
//! private mapping of a raw file: the floor any store is measured against.

use std::fs::File;
use std::time::Duration;

use dormouse_guest::{Command, Guest, GuestParams, park_and_pause};
use dormouse_minivm::timeline::monotonic_now;
use dormouse_minivm::{Dirty, MiniVm, Phase, Timeline, VmShell};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const BYTES: usize = 128 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1..) {
        Some([directory]) => boot(directory),
        Some([directory, begun]) => wake(directory, Duration::from_nanos(begun.parse()?)),
        _ => Err("usage: wake DIRECTORY".into()),
    }
}

fn boot(directory: &str) -> Outcome {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), BYTES)])?;
    let params = GuestParams::new(4096, 1)?;
    let mut vm = MiniVm::boot(VmShell::create()?, memory.clone(), &params, Dirty::Untracked)?;
    vm.resume()?;
    vm.console().wait_for(b'.', 1, PATIENCE)?;
    println!("boot\n{}", vm.timeline());
    park_and_pause(&mut vm, PATIENCE)?;
    std::fs::write(format!("{directory}/state"), vm.save_state()?)?;
    let mut file = File::create(format!("{directory}/memory"))?;
    memory.write_all_volatile_to(GuestAddress(0), &mut file, BYTES)?;
    for run in 0..5 {
        let begun = monotonic_now().as_nanos().to_string();
        println!("wake {run}");
        std::process::Command::new(std::env::current_exe()?).args([directory, &begun]).status()?;
    }
    Ok(())
}

fn wake(directory: &str, begun: Duration) -> Outcome {
    let timeline = Timeline::begun_at(begun);
    timeline.mark(Phase::ProcessStarted);
    let shell = VmShell::create_with(timeline)?;
    let file = FileOffset::new(File::open(format!("{directory}/memory"))?, 0);
    let (read_write, private) = (0x3, 0x2);
    let region = MmapRegion::build(Some(file), BYTES, read_write, private | 0x4000)?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or("address overflow")?;
    let memory = GuestMemoryMmap::from_regions(vec![region])?;
    let state = std::fs::read(format!("{directory}/state"))?;
    let mut vm = MiniVm::restore(shell, memory, &state, Dirty::Untracked)?;
    vm.send(Command::Answer);
    vm.resume()?;
    vm.console().wait_for(b'.', 1, PATIENCE)?;
    println!("{}", vm.timeline());
    Ok(())
}
