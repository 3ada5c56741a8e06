//! Crashes and faults at every operation of an import and a removal.
//!
//! Whenever it happens, what was acknowledged before stays byte for byte, and the name being made is as it was or
//! complete. Threads of an import may ask in another order each time, so sweeps go on until nothing was hit.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use common::{Machine, Remembered, copy_of, fresh, memory_backend};
use dormouse_chunkstore::{
    ImportRequest, NoProgress, Result, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{
        Backend,
        faulty::{Fault, FaultyBackend},
    },
};
use dormouse_core::Name;

/// A store with acknowledged snapshots, and an import that is about to happen.
struct Scene {
    before: Arc<dyn Backend>,
    acknowledged: Vec<(&'static str, Remembered)>,
    machine: Machine,
    request: ImportRequest,
}

impl Scene {
    /// `a`, its child `b`, and `other`, which has pages that the new machine will have too.
    fn new(pages: u64, name: &str, parent: Option<&str>) -> Self {
        let before = memory_backend();
        let store = fresh(&before, None);
        let mut machine = Machine::new(120, 20);
        machine.import(&store, "a", None).unwrap();
        let a = machine.remember();
        machine.change(1, 30);
        machine.import(&store, "b", Some("a")).unwrap();
        let b = machine.remember();
        let mut other = Machine::unlike(3, 60, 6);
        other.change(2, 20);
        other.import(&store, "other", None).unwrap();
        machine.rewrite_memory_pages(2, &(0..pages).map(|p| p * 3 / 2 + 4).collect::<Vec<_>>());
        let request = machine.request(name, parent);
        let acknowledged = vec![("a", a), ("b", b), ("other", other.remember())];
        Scene { before, acknowledged, machine, request }
    }

    fn target(&self) -> &str {
        self.request.name.as_str()
    }

    /// Runs the import with a fault at operation `n`; what it returned, the store, and whether the fault was hit.
    fn import_with(&self, fault: Fault, n: u64) -> (Result<()>, Arc<dyn Backend>, bool) {
        let inner = copy_of(&*self.before);
        let faulty = Arc::new(FaultyBackend::new(inner.clone(), move |i, _, _| (i == n).then_some(fault)));
        let store = Store::with_backend(faulty.clone(), StoreOptions::default());
        let done = store.import(&self.request, &NoProgress).map(drop);
        (done, inner, faulty.operations() > n)
    }

    /// Everything acknowledged is there; the target is as it was, or complete. Whether it is complete.
    fn check(&self, backend: &Arc<dyn Backend>, how: &str) -> bool {
        let new = self.machine.remember();
        let mut complete = false;
        for (name, machine) in &self.acknowledged {
            if *name == self.target() {
                continue;
            }
            machine.check(&fresh(backend, None), name).unwrap_or_else(|e| panic!("{how}: {name}: {e}"));
        }
        let store = fresh(backend, None);
        let sequence = |s: &Store| Some(s.open_snapshot(&self.request.name).ok()?.reference().sequence);
        let old = self.acknowledged.iter().find(|(name, _)| *name == self.target());
        match (sequence(&store), sequence(&fresh(&self.before, None))) {
            (now, before) if now == before => {
                if let Some((name, machine)) = old {
                    machine.check(&store, name).unwrap_or_else(|e| panic!("{how}: {name}: {e}"));
                } else {
                    let error = new.check(&store, self.target()).unwrap_err();
                    assert!(matches!(error, StoreError::NoSuchSnapshot { .. }), "{how}: {error:?}");
                }
            }
            _ => {
                new.check(&store, self.target()).unwrap_or_else(|e| panic!("{how}: {e}"));
                complete = true;
            }
        }
        let report = store.verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(report.is_clean(), "{how}: {report:?}");
        complete
    }

    /// The same import, tried again without faults, succeeds; if it was complete already, when told to replace.
    fn retry(&self, backend: &Arc<dyn Backend>, complete: bool, how: &str) {
        let mut request = self.request.clone();
        request.replace |= complete;
        let store = fresh(backend, None);
        store.import(&request, &NoProgress).unwrap_or_else(|e| panic!("{how}, again: {e}"));
        assert!(self.check(backend, how));
    }

    fn sweep(&self, fault: Fault) {
        let mut errors = 0;
        let mut missed = 0;
        for n in 0.. {
            let how = format!("{fault:?} at operation {n}");
            let (done, backend, hit) = self.import_with(fault, n);
            let complete = self.check(&backend, &how);
            assert!(done.is_err() || complete, "{how}: acknowledged, but not there");
            if let Err(error) = &done {
                errors += 1;
                let named = match fault {
                    Fault::Full => matches!(error, StoreError::Full { .. }),
                    Fault::Truncate | Fault::FlipBit => {
                        matches!(error, StoreError::Damaged { .. } | StoreError::Missing { .. })
                    }
                    _ => matches!(error, StoreError::Unavailable { .. } | StoreError::InDoubt { .. }),
                };
                assert!(named, "{how}: {error:?}");
                // Only a writer that died cannot put back what it moved.
                assert!(!complete || fault == Fault::Dead, "{how}: an error, but the name moved: {error}");
            }
            self.retry(&backend, complete, &how);
            missed += u64::from(!hit);
            if missed == 3 {
                assert!(n > 10, "the sweep went through an import");
                break;
            }
        }
        // Without a parent, all that is read is what others stored: damaged, it is not shared.
        let only_reads = matches!(fault, Fault::Truncate | Fault::FlipBit);
        assert!(errors > 0 || (only_reads && self.request.parent.is_none()), "no {fault:?} mattered");
    }
}

fn scenes() -> [Scene; 3] {
    [Scene::new(40, "new", Some("b")), Scene::new(40, "b", Some("b")), Scene::new(40, "new", None)]
}

#[test]
fn a_crash_at_any_operation_of_an_import_loses_nothing() {
    scenes().iter().for_each(|s| s.sweep(Fault::Dead));
}

#[test]
fn an_operation_that_fails_leaves_the_store_as_it_was() {
    scenes().iter().for_each(|s| s.sweep(Fault::Fail));
}

#[test]
fn a_lost_answer_ends_in_success_or_a_clean_retry() {
    scenes().iter().for_each(|s| s.sweep(Fault::LoseAnswer));
}

#[test]
fn a_full_disk_at_any_operation_leaves_the_store_as_it_was() {
    scenes().iter().for_each(|s| s.sweep(Fault::Full));
}

#[test]
fn a_damaged_read_fails_an_import_or_does_not_matter() {
    scenes().iter().for_each(|s| s.sweep(Fault::Truncate));
    scenes().iter().for_each(|s| s.sweep(Fault::FlipBit));
}

#[test]
fn a_crash_between_several_packs_loses_nothing() {
    // Some 14 MB of new frames: more than a pack.
    let scene = Scene::new(7_000, "new", Some("b"));
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let (inner, keys) = (copy_of(&*scene.before), seen.clone());
    let faulty = Arc::new(FaultyBackend::new(inner, move |_, op, key| {
        if op == "put" && key.contains("/packs/") {
            keys.lock().unwrap().insert(key.to_owned());
        }
        None
    }));
    Store::with_backend(faulty.clone(), StoreOptions::default()).import(&scene.request, &NoProgress).unwrap();
    assert!(seen.lock().unwrap().len() >= 3, "two packs of pages and one of page maps");
    for fault in [Fault::Dead, Fault::Full] {
        for n in 0..faulty.operations() + 2 {
            let how = format!("{fault:?} at operation {n}");
            let (done, backend, _) = scene.import_with(fault, n);
            let complete = scene.check(&backend, &how);
            assert!(done.is_err() || complete, "{how}");
        }
    }
}

#[test]
fn an_ambiguous_commit_succeeds() {
    for scene in scenes() {
        let inner = copy_of(&*scene.before);
        let faulty =
            FaultyBackend::new(inner.clone(), |_, op, _| (op == "swap").then_some(Fault::LoseAnswer));
        let store = Store::with_backend(Arc::new(faulty), StoreOptions::default());
        store.import(&scene.request, &NoProgress).unwrap();
        assert!(scene.check(&inner, "a lost answer to the swap"));
    }
}

/// Whoever took it for "nothing was stored" let a machine run on whose snapshot was there.
#[test]
fn a_commit_that_is_not_answered_by_a_store_that_stays_away_is_in_doubt_and_no_earlier_failure_is() {
    for scene in scenes() {
        for (op, fault) in [("swap", Fault::LoseAnswer), ("swap", Fault::Fail), ("list", Fault::Fail)] {
            let inner = copy_of(&*scene.before);
            let away = AtomicBool::new(false);
            let faulty = FaultyBackend::new(inner.clone(), move |_, asked, _| {
                if away.load(Ordering::SeqCst) {
                    return Some(Fault::Fail);
                }
                away.store(asked == op, Ordering::SeqCst);
                (asked == op).then_some(fault)
            });
            let store = Store::with_backend(Arc::new(faulty), StoreOptions::default());
            let error = store.import(&scene.request, &NoProgress).unwrap_err();
            let in_doubt = matches!(&error, StoreError::InDoubt { name, .. } if name == scene.target());
            assert_eq!(in_doubt, op == "swap", "{op}, {fault:?}: {error:?}");
            assert!(error.is_retryable());
            assert_eq!(scene.check(&inner, "not answered"), fault == Fault::LoseAnswer);
        }
    }
}

#[test]
fn faults_at_every_operation_of_a_removal_lose_nothing() {
    let scene = Scene::new(40, "b", Some("b"));
    let name = Name::new("b").unwrap();
    for fault in [Fault::Dead, Fault::Fail, Fault::LoseAnswer, Fault::Full] {
        for n in 0..8 {
            let how = format!("{fault:?} at operation {n}");
            let inner = copy_of(&*scene.before);
            let faulty = FaultyBackend::new(inner.clone(), move |i, _, _| (i == n).then_some(fault));
            let done = Store::with_backend(Arc::new(faulty), StoreOptions::default()).remove(&name);
            for (name, machine) in &scene.acknowledged {
                match machine.check(&fresh(&inner, None), name) {
                    Ok(()) => assert!(*name != "b" || done.is_err(), "{how}: removed, but there"),
                    Err(StoreError::NoSuchSnapshot { .. }) if *name == "b" => {}
                    Err(e) => panic!("{how}: {name}: {e}"),
                }
            }
            assert!(fresh(&inner, None).verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
            match fresh(&inner, None).remove(&name) {
                Ok(()) => assert!(done.is_err(), "{how}: removed twice"),
                Err(StoreError::NoSuchSnapshot { .. }) => {}
                Err(e) => panic!("{how}, again: {e}"),
            }
            assert!(fresh(&inner, None).open_snapshot(&name).is_err());
        }
    }
}
