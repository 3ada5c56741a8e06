//! The guest program on both its hosts: boot, verify, sleep, wake, go through generations.

use std::time::Duration;

use dormouse_guest::native::NativeGuest;
use dormouse_guest::{Command, Guest, GuestParams, layout, park_and_pause};
use dormouse_minivm::{Dirty, MiniVm, VmShell};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
const HIGH: u64 = 4 << 30;

fn have_kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let required = std::env::var_os("DORMOUSE_REQUIRE_KVM").is_some_and(|v| v == "1");
    assert!(there || !required, "DORMOUSE_REQUIRE_KVM=1, but /dev/kvm cannot be opened");
    if !there {
        dormouse_testkit::skipped!("/dev/kvm cannot be opened");
    }
    there
}

/// Two regions; the pattern lies across both: data starts at 16 MiB, and only 2 MiB more are low.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 18 * MIB), (GuestAddress(HIGH), 6 * MIB)])
        .expect("memory")
}

fn params() -> GuestParams {
    GuestParams::new(1024, 0x1234_5678_9abc_def0).expect("valid")
}

fn copy(from: &GuestMemoryMmap) -> GuestMemoryMmap {
    let to = memory();
    let mut page = vec![0u8; MIB];
    for region in from.iter() {
        for offset in (0..region.len()).step_by(MIB) {
            let at = GuestAddress(region.start_addr().0 + offset);
            from.read_slice(&mut page, at).expect("read");
            to.write_slice(&page, at).expect("write");
        }
    }
    to
}

type Boot = fn(GuestMemoryMmap) -> Box<dyn Guest>;
type Restore = fn(GuestMemoryMmap, &[u8]) -> Box<dyn Guest>;

const KVM: (Boot, Restore) = (
    |memory| Box::new(MiniVm::boot(shell(), memory, &params(), Dirty::Tracked).expect("boot")),
    |memory, state| Box::new(MiniVm::restore(shell(), memory, state, Dirty::Tracked).expect("restore")),
);
const PROCESS: (Boot, Restore) = (
    |memory| Box::new(NativeGuest::boot(memory, &params(), true).expect("boot")),
    |memory, state| Box::new(NativeGuest::restore(memory, &params(), state, true).expect("restore")),
);

fn shell() -> VmShell {
    VmShell::create().expect("KVM")
}

/// Waits until `byte` is there, said before or after now.
fn wait(guest: &dyn Guest, byte: u8) {
    guest.console().wait_for(byte, 1, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
}

fn assert_all_right(guest: &dyn Guest) {
    let console = guest.console();
    assert_eq!(
        (console.count(b'X'), console.count(b'x'), console.wrong_total()),
        (0, 0, 0),
        "{}",
        console.text()
    );
}

fn boots_and_verifies((boot, _): (Boot, Restore)) {
    let mut guest = boot(memory());
    guest.resume().expect("start");
    guest.console().wait_for(b'.', 2, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
    assert!(guest.console().text().starts_with("BRA.A."), "{}", guest.console().text());
    assert_all_right(&*guest);
}

fn sleeps_and_wakes((boot, restore): (Boot, Restore)) {
    let memory = memory();
    let mut guest = boot(memory.clone());
    guest.resume().expect("start");
    wait(&*guest, b'.');
    park_and_pause(&mut *guest, PATIENCE).expect("park");
    let state = guest.save_state().expect("state");
    let image = copy(&memory);
    drop(guest);

    for wake in 0..3 {
        let mut guest = restore(copy(&image), &state);
        guest.send(Command::Answer);
        guest.resume().expect("wake");
        wait(&*guest, b'.');
        assert!(guest.console().text().starts_with("A."), "wake {wake}: {}", guest.console().text());
        assert_all_right(&*guest);
    }
}

fn finds_a_wrong_page((boot, restore): (Boot, Restore)) {
    let memory = memory();
    let mut guest = boot(memory.clone());
    guest.resume().expect("start");
    wait(&*guest, b'R');
    park_and_pause(&mut *guest, PATIENCE).expect("park");
    let state = guest.save_state().expect("state");
    drop(guest);
    // One in the low region, one in the high one; the second word and the last.
    let low = GuestAddress(layout::DATA_ADDR + 3 * 4096 + 2048);
    let high = GuestAddress(HIGH + 100 * 4096 + 4088);
    for address in [low, high] {
        let was: u64 = memory.read_obj(address).expect("read");
        memory.write_obj(was ^ 1 << 40, address).expect("write");
    }
    let mut guest = restore(memory, &state);
    guest.send(Command::Answer);
    guest.resume().expect("wake");
    guest.console().wait_for(b'X', 1, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
    guest.pause().expect("pause");
    assert_eq!(guest.console().wrong_pages()[..2], [3, 512 + 100]);
    assert!(guest.console().wrong_total() >= 2 && guest.console().count(b'.') == 0);
}

fn finds_an_old_answer_page((boot, restore): (Boot, Restore)) {
    let memory = memory();
    let mut guest = boot(memory.clone());
    guest.resume().expect("start");
    wait(&*guest, b'R');
    park_and_pause(&mut *guest, PATIENCE).expect("park");
    let state = guest.save_state().expect("state");
    drop(guest);
    let zeroed = GuestAddress(layout::DATA_ADDR); // page 0 is in every answer
    memory.write_slice(&[0; 4096], zeroed).expect("write");
    let mut guest = restore(memory, &state);
    guest.send(Command::Answer);
    guest.resume().expect("wake");
    guest.console().wait_for(b'x', 1, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
}

/// Ten generations, each stored as what changed since the one before, each woken in a new machine.
fn ten_generations((boot, restore): (Boot, Restore)) {
    let first = memory();
    let mut guest = boot(first.clone());
    guest.resume().expect("start");
    wait(&*guest, b'.');
    park_and_pause(&mut *guest, PATIENCE).expect("park");
    let mut state = guest.save_state().expect("state");
    let mut image = copy(&first);
    drop(guest);
    for generation in 1..=10u32 {
        let memory = copy(&image);
        let mut guest = restore(memory.clone(), &state);
        guest.send(Command::Mutate);
        guest.resume().expect("wake");
        wait(&*guest, b'.');
        park_and_pause(&mut *guest, PATIENCE).expect("park");
        assert_all_right(&*guest);
        assert_eq!(guest.console().generation(), Some(generation));
        state = guest.save_state().expect("state");
        let dirty = guest.take_dirty().expect("log").expect("tracked");
        let pages: u64 = dirty.iter().map(|run| run.bytes / 4096).sum();
        assert!((128..160).contains(&pages), "generation {generation} dirtied {pages} of 1024 pages");
        drop(guest);
        let child = copy(&image);
        for run in dirty {
            let mut bytes = vec![0; run.bytes as usize];
            memory.read_slice(&mut bytes, GuestAddress(run.physical)).expect("read");
            child.write_slice(&bytes, GuestAddress(run.physical)).expect("write");
        }
        image = child;
    }
}

/// Paused wherever it happens to be, between any two instructions, and woken in a new machine each time.
fn survives_pauses_anywhere((boot, restore): (Boot, Restore)) {
    let memory = memory();
    let mut guest = boot(memory.clone());
    guest.resume().expect("start");
    wait(&*guest, b'R');
    for wake in 0..40u64 {
        // Different places, not synchronisation: any place will do.
        std::thread::sleep(Duration::from_micros(wake * 977 % 3001));
        guest.pause().expect("pause");
        assert_all_right(&*guest);
        let state = guest.save_state().expect("state");
        drop(guest);
        guest = restore(memory.clone(), &state);
        if wake % 4 == 0 {
            guest.send(Command::Mutate);
        }
        // A process guest is parked when restored: it needs a command to go on.
        guest.send(Command::Answer);
        guest.resume().expect("wake");
        if wake % 4 == 0 {
            wait(&*guest, b'M');
        }
    }
    wait(&*guest, b'.');
    assert_all_right(&*guest);
    assert_eq!(guest.console().generation(), Some(10));
}

#[test]
fn a_running_guest_does_not_give_its_state() {
    let mut guest = NativeGuest::boot(memory(), &params(), true).expect("boot");
    guest.resume().expect("start");
    assert!(guest.save_state().is_err() && guest.take_dirty().is_err());
}

#[test]
fn a_state_of_the_other_kind_is_refused() {
    let mut guest = NativeGuest::boot(memory(), &params(), false).expect("boot");
    let state = guest.save_state().expect("state");
    if have_kvm() {
        let refused = MiniVm::restore(shell(), memory(), &state, Dirty::Untracked);
        assert!(refused.err().expect("refused").to_string().contains("Process"));
    }
}

macro_rules! on_both_hosts {
    ($($case:ident),* $(,)?) => {
        mod kvm { $(#[test] fn $case() { if super::have_kvm() { super::$case(super::KVM) } })* }
        mod process { $(#[test] fn $case() { super::$case(super::PROCESS) })* }
    };
}
on_both_hosts!(
    boots_and_verifies,
    sleeps_and_wakes,
    finds_a_wrong_page,
    finds_an_old_answer_page,
    ten_generations,
    survives_pauses_anywhere
);
