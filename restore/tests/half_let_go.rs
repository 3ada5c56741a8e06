//! A detach that lets one region go and fails at the next. Alone in its file, and so in its process: it relies on
//! addresses that were unmapped staying so.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use common::scripted::{Ask, counted_kill, scripted};
use common::{TestImage, uffd_or_skip, until, verify};
use dormouse_core::page::{PageCount, PageIndex};
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::{Mapping, Memory, PageSize, Plan, Policy, RegionSpec, Restore, VmStopped};

const HALF: u64 = 64;

/// A vCPU touches a page it gave back in the region that is let go. That the next region cannot be let go does not make
/// this one come back: the late answer to that fault found it gone, and ended the VM.
#[test]
fn a_fault_in_a_region_let_go_ends_nothing_when_the_next_region_cannot_be() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(HALF * 2));
    let [first, second] = [(); 2].map(|()| Arc::new(Mapping::new(HALF, PageSize::Small).unwrap()));
    let halves = [0, HALF].map(|page| RegionSpec {
        image_first: PageIndex(page),
        pages: PageCount(HALF),
        page_size: PageSize::Small,
    });
    let plan = Plan::new(image.clone(), &halves).unwrap();
    // Announced, as by a VMM, so that nothing here keeps the second one mapped.
    let announced = [&first, &second].map(|m| {
        drop(uffd.register(m).unwrap());
        AnnouncedRegion { address: m.addr(), bytes: m.bytes() as u64, page_size: PageSize::Small }
    });
    let memory = Memory::adopt(uffd.try_clone_fd().unwrap(), &announced).unwrap();
    let (fail_closed, killed) = counted_kill();
    let (asked, is_asked) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let late = move |ask, _| {
        if ask == Ask::Zero {
            asked.send(()).unwrap();
            may_go.lock().unwrap().recv_timeout(Duration::from_secs(60)).unwrap();
        }
        None
    };
    let policy = Policy { fail_closed, ..Policy::default() };
    let handle = Restore::start_with(plan, memory, policy, scripted(late)).unwrap();
    first.discard(10, 1).unwrap();
    handle.fill_all();
    handle.wait_filled().unwrap();
    let vcpu = std::thread::spawn({
        let first = first.clone();
        move || assert_eq!(first.load(10 * 4096), Some(0))
    });
    is_asked.recv().unwrap();
    drop(second);
    let refused = *handle.detach().expect_err("nothing is where the second region was");
    vcpu.join().unwrap();
    go.send(()).unwrap();
    let handle = refused.handle;
    until("the late answer", || handle.timeline().fault_latency.count() > 0);
    handle.stop(VmStopped::attest());
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    (0..10).chain(11..HALF).for_each(|p| verify(&image, &first, p));
}
