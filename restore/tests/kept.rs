//! A restore that ends without its VM, and another that goes on with what it left.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use common::{TestImage, own, uffd_or_skip, verify};
use dormouse_core::page::{PAGE_BYTES, PageIndex};
use dormouse_restore::kept::layout::LayoutError;
use dormouse_restore::state::PageState;
use dormouse_restore::sys::shared_file::{SharedFile, SharedFileError};
use dormouse_restore::sys::uffd::EventBuffer;
use dormouse_restore::{
    KeptStates, KeptStatesError, Mapping, Memory, PageSize, Plan, Policy, Restore, RestoreHandle, Uffd,
    VmStopped,
};

const IMAGE: [u8; 32] = [3; 32];
const SOON: Duration = Duration::from_secs(10);

struct Vm {
    plan: Plan,
    uffd: Uffd,
    mapping: Arc<Mapping>,
    states: OwnedFd,
}

impl Vm {
    fn start(image: &Arc<TestImage>, uffd: Uffd) -> (Self, RestoreHandle) {
        let (plan, memory, mapping) = own(image, PageSize::Small, uffd.clone());
        let states = KeptStates::create(&plan, &memory, IMAGE).unwrap();
        let kept = states.as_fd().try_clone_to_owned().unwrap();
        let vm = Vm { plan: plan.clone(), uffd, mapping, states: kept };
        (vm, Restore::start_kept(plan, memory, states, Policy::default()).unwrap())
    }

    fn memory(&self) -> Memory {
        Memory::own(self.uffd.clone(), std::slice::from_ref(&self.mapping)).unwrap()
    }

    fn open(&self, image: [u8; 32], patience: Duration) -> Result<KeptStates, KeptStatesError> {
        let file = self.states.try_clone().unwrap();
        KeptStates::open(file, &self.plan, &self.memory(), image, patience)
    }

    fn adopt(&self) -> RestoreHandle {
        let states = self.open(IMAGE, SOON).unwrap();
        Restore::adopt(self.plan.clone(), self.memory(), states, Policy::default()).unwrap()
    }
}

#[track_caller]
fn verify_zero(mapping: &Mapping, page: u64) {
    let mut found = [1; PAGE_BYTES];
    assert!(mapping.read_page(page, &mut found));
    assert!(found.iter().all(|b| *b == 0), "page {page} was given back and shows old bytes");
}

#[test]
fn a_second_restore_goes_on_where_the_first_ended() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(2048));
    let (vm, handle) = Vm::start(&image, uffd);
    (0..320).for_each(|p| verify(&image, &vm.mapping, p));
    vm.mapping.discard(100, 50).unwrap();
    vm.mapping.discard(1000, 50).unwrap();
    while handle.page_state(PageIndex(1049)) != Some(PageState::Removed) {
        std::thread::yield_now();
    }
    handle.stop(VmStopped::attest());

    let handle = vm.adopt();
    assert_eq!(handle.page_state(PageIndex(0)), Some(PageState::Installed));
    assert_eq!(handle.page_state(PageIndex(100)), Some(PageState::Removed));
    assert_eq!(handle.page_state(PageIndex(500)), Some(PageState::Absent));
    (100..150).chain(1000..1050).for_each(|p| verify_zero(&vm.mapping, p));
    (0..100).chain(150..1000).chain(1050..2048).for_each(|p| verify(&image, &vm.mapping, p));
    handle.fill_all();
    handle.wait_filled().unwrap();
    let counts = handle.detach().unwrap();
    assert_eq!(counts.exists, 0, "nothing that the first installed is installed again");
    assert_eq!(counts.pages_copied, 2048 - 320 - 50);
    (100..150).for_each(|p| verify_zero(&vm.mapping, p));
}

#[test]
fn a_fault_that_the_first_had_read_is_answered_by_the_second() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (vm, handle) = Vm::start(&image, uffd);
    handle.stop(VmStopped::attest());
    std::thread::scope(|s| {
        let touching = s.spawn(|| verify(&image, &vm.mapping, 7));
        let mut events = EventBuffer::new(1);
        while vm.uffd.read_events(&mut events).unwrap().count() == 0 {
            std::thread::yield_now();
        }
        assert!(!touching.is_finished());
        let handle = vm.adopt();
        touching.join().unwrap();
        handle.stop(VmStopped::attest());
    });
}

#[test]
fn pages_left_in_every_state_are_right_afterwards() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (vm, handle) = Vm::start(&image, uffd);
    verify(&image, &vm.mapping, 0);
    handle.stop(VmStopped::attest());
    // Claimed by a thread that was killed before its copy, and after it; and awaited.
    let file = SharedFile::open(vm.states.try_clone().unwrap(), SOON).unwrap();
    let state = |page: u64, state| file.write(8192 + page, &[state as u8]);
    assert!(state(0, PageState::Copying) && state(1, PageState::Awaited));
    assert!(state(40, PageState::Copying) && state(41, PageState::Awaited));
    drop(file);
    let handle = vm.adopt();
    (0..64).for_each(|p| verify(&image, &vm.mapping, p));
    // The guest has not touched the first frame again, so it takes a prefetch to find that it is there.
    handle.fill_all();
    handle.wait_filled().unwrap();
    assert_eq!(handle.detach().unwrap().exists, 2, "two copies had happened");
}

#[test]
fn one_process_at_a_time_uses_the_states() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (vm, handle) = Vm::start(&image, uffd);
    let refused = vm.open(IMAGE, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(refused, KeptStatesError::File(SharedFileError::InUse)), "{refused}");
    std::thread::scope(|s| {
        let waiting = s.spawn(|| vm.open(IMAGE, SOON).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        handle.stop(VmStopped::attest());
        waiting.join().unwrap();
    });
}

#[test]
fn states_of_something_else_are_refused_by_name() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (mut vm, handle) = Vm::start(&image, uffd);
    handle.stop(VmStopped::attest());
    let refused = vm.open([4; 32], SOON).unwrap_err();
    assert!(matches!(refused, KeptStatesError::Layout(LayoutError::OtherImage { .. })), "{refused}");
    let file = SharedFile::open(vm.states.try_clone().unwrap(), SOON).unwrap();
    assert!(file.write(8192 + 9, &[77]));
    drop(file);
    let refused = vm.open(IMAGE, SOON).unwrap_err();
    let expected = LayoutError::BadState { cell: 9, byte: 77 };
    assert!(matches!(&refused, KeptStatesError::Layout(e) if *e == expected), "{refused}");

    vm.states = std::fs::File::open("/dev/null").unwrap().into();
    let refused = vm.open(IMAGE, SOON).unwrap_err();
    assert!(matches!(refused, KeptStatesError::File(SharedFileError::NotSealed)), "{refused}");
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    vm.states = rustix::fs::memfd_create("could shrink", flags).unwrap();
    let refused = vm.open(IMAGE, SOON).unwrap_err();
    assert!(matches!(refused, KeptStatesError::File(SharedFileError::NotSealed)), "{refused}");
}

#[test]
fn the_states_of_a_large_machine_cost_nothing_until_it_is_touched() {
    const PAGES: u64 = 16 << 20;
    let Some(uffd) = uffd_or_skip() else { return };
    let zero = dormouse_restore::Extent::zero(PageIndex(0), PAGES);
    let image = Arc::new(TestImage::of(vec![zero]));
    let (vm, handle) = Vm::start(&image, uffd);
    let occupied = || rustix::fs::fstat(vm.states.as_fd()).unwrap().st_blocks * 512;
    assert!(occupied() <= 3 * 4096, "{} bytes for 64 GiB", occupied());
    assert_eq!(vm.mapping.load(9_000_000 * PAGE_BYTES), Some(0));
    handle.stop(VmStopped::attest());
    let handle = vm.adopt();
    assert_eq!(vm.mapping.load(PAGE_BYTES), Some(0));
    handle.stop(VmStopped::attest());
    assert!(occupied() <= 6 * 4096, "{} bytes for 64 GiB", occupied());
}

/// Seen with a guest that gave memory back as it was let go: it waited for ever for its event to be read.
#[test]
fn a_removal_that_begins_as_the_vm_is_let_go_is_not_left_waiting() {
    let image = Arc::new(TestImage::full(64));
    for _ in 0..300 {
        let Some(uffd) = uffd_or_skip() else { return };
        // The VM's own userfaultfd stays open.
        let (vm, handle) = Vm::start(&image, uffd);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (done, finished) = std::sync::mpsc::channel();
        let mapping = vm.mapping.clone();
        std::thread::spawn(move || {
            while let Err(std::sync::mpsc::TryRecvError::Empty) = stopped.try_recv() {
                mapping.discard(8, 1).unwrap();
            }
            done.send(()).unwrap();
        });
        handle.detach().unwrap();
        drop(stop);
        finished.recv_timeout(SOON).expect("a thread that gives memory back hangs");
    }
}
