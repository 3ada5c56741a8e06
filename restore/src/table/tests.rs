use std::sync::Arc;

use super::*;

#[cfg(not(feature = "loom"))]
mod threads {
    use super::*;

    #[test]
    fn one_of_many_threads_wins_each_claim() {
        // Miri takes a thousand times as long.
        let cells = if cfg!(miri) { 400 } else { 40_000 };
        let table = Arc::new(PageTable::new(cells));
        let wins: u64 = std::thread::scope(|s| {
            let claim = || {
                (0..cells).filter(|&c| table.apply(Cell(c), PageEvent::Claim) == Action::Install).count()
                    as u64
            };
            let threads: Vec<_> = (0..4).map(|_| s.spawn(claim)).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).sum()
        });
        assert_eq!(wins, cells);
    }

    #[test]
    fn settled_counts_each_page_once() {
        let table = PageTable::new(3);
        for event in [PageEvent::Claim, PageEvent::Copied, PageEvent::Removed, PageEvent::Removed] {
            table.apply(Cell(0), event);
        }
        assert_eq!(table.settled(), 1);
        assert_eq!(table.get(Cell(3)), PageState::Poisoned, "outside the table nothing is claimable");
        assert_eq!(table.apply(Cell(3), PageEvent::Fault), Action::None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a table for 64 GiB takes minutes there")]
    fn an_untouched_table_holds_no_leaves() {
        let table = PageTable::new(16 << 20);
        assert_eq!(table.get(Cell(9_000_000)), PageState::Absent);
        table.apply(Cell(9_000_000), PageEvent::Fault);
        let States::Own(leaves) = &table.states else { panic!("in this process") };
        assert_eq!(leaves.iter().filter(|l| l.get().is_some()).count(), 1);
    }
}

/// Every interleaving of the threads that meet at one page, with a model of the kernel's page.
#[cfg(feature = "loom")]
mod model {
    use loom::sync::RwLock;
    use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    use loom::thread;

    use super::{Action, Arc, PageEvent, PageState, StateByte, apply};

    impl StateByte for AtomicU8 {
        fn load(&self) -> u8 {
            self.load(Ordering::Acquire)
        }
        fn exchange(&self, seen: u8, new: u8) -> Result<u8, u8> {
            self.compare_exchange_weak(seen, new, Ordering::AcqRel, Ordering::Acquire)
        }
    }

    fn absent() -> Arc<AtomicU8> {
        Arc::new(AtomicU8::new(PageState::Absent as u8))
    }

    fn now(state: &AtomicU8) -> PageState {
        PageState::from_u8(state.load(Ordering::Acquire))
    }

    #[test]
    fn a_removed_page_never_shows_the_images_bytes() {
        loom::model(|| {
            let state = absent();
            let gate = Arc::new(RwLock::new(()));
            let image_bytes_shown = Arc::new(AtomicBool::new(false));
            let (s, g, p) = (state.clone(), gate.clone(), image_bytes_shown.clone());
            let copier = thread::spawn(move || {
                let _inside = g.read().unwrap();
                if apply(&*s, PageEvent::Claim).2 == Action::Install && now(&s) == PageState::Copying {
                    p.store(true, Ordering::Release);
                    apply(&*s, PageEvent::Copied);
                }
            });
            {
                let _outside = gate.write().unwrap();
                apply(&*state, PageEvent::Removed);
            }
            // The kernel drops the page only after the event was read.
            image_bytes_shown.store(false, Ordering::Release);
            copier.join().unwrap();
            assert_eq!(now(&state), PageState::Removed);
            assert!(!image_bytes_shown.load(Ordering::Acquire), "a copy landed after the removal");
        });
    }

    #[test]
    fn a_fault_that_races_an_install_is_answered() {
        loom::model(|| {
            let state = absent();
            let woken = Arc::new(AtomicBool::new(false));
            let (s, w) = (state.clone(), woken.clone());
            let copier = thread::spawn(move || {
                if apply(&*s, PageEvent::Claim).2 == Action::Install {
                    w.store(true, Ordering::Release);
                    apply(&*s, PageEvent::Copied);
                }
            });
            let action = apply(&*state, PageEvent::Fault).2;
            copier.join().unwrap();
            let scheduled =
                action == Action::Schedule && apply(&*state, PageEvent::Claim).2 == Action::Install;
            assert!(woken.load(Ordering::Acquire) || action == Action::Wake || scheduled);
        });
    }

    #[test]
    fn a_fault_that_races_an_install_that_fails_is_answered() {
        loom::model(|| {
            let state = absent();
            let s = state.clone();
            let copier = thread::spawn(move || {
                apply(&*s, PageEvent::Claim).2 == Action::Install
                    && apply(&*s, PageEvent::Released).2 == Action::Wake
            });
            let action = apply(&*state, PageEvent::Fault).2;
            let woken = copier.join().unwrap();
            let scheduled =
                action == Action::Schedule && apply(&*state, PageEvent::Claim).2 == Action::Install;
            assert!(woken || scheduled, "a vCPU waits and nobody works");
        });
    }
}
