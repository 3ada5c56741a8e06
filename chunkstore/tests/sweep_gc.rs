//! Crashes and faults at every operation of removing, collecting and repacking.
//!
//! Whenever it happens, what was acknowledged stays byte for byte, verification finds nothing, and once a collection
//! has run through, the store holds what it would have held had nothing happened.
#![allow(clippy::unwrap_used)]

mod common;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use common::{Machine, Remembered, copy_of, memory_backend, objects};
use dormouse_chunkstore::{
    GcOptions, NoProgress, RepackOptions, Result, Store, StoreOptions, VerifyDepth,
    backend::{
        Backend,
        faulty::{Fault, FaultyBackend},
    },
};
use dormouse_core::{Domain, Name, Named};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };
const FAULTS: [Fault; 3] = [Fault::Dead, Fault::Fail, Fault::LoseAnswer];

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

/// Whoever was silent is taken for dead at once, so that nobody has to wait for a lease to run out.
fn store_on(backend: Arc<dyn Backend>) -> Store {
    Store::with_backend(backend, StoreOptions { lease: Duration::ZERO, ..Default::default() })
}

/// `a`, its children `b` and `c`, of which each has pages of its own, and garbage of a removed `d`.
struct Scene {
    before: Arc<dyn Backend>,
    acknowledged: Vec<(&'static str, Remembered)>,
}

impl Scene {
    fn new() -> Self {
        let before = memory_backend();
        let store = store_on(before.clone());
        let mut machine = Machine::new(150, 20);
        let mut acknowledged = Vec::new();
        for (generation, (me, parent)) in
            [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", Some("c"))].into_iter().enumerate()
        {
            machine.change(generation as u64, 40);
            machine.import(&store, me, parent).unwrap();
            acknowledged.push((me, machine.remember()));
        }
        acknowledged.pop();
        store.remove(&name("d")).unwrap();
        Scene { before, acknowledged }
    }

    /// Every operation of `act`, failing in every way; `gone` is what it may remove. With `same_packs` it ends in the
    /// same packs however often it was begun.
    fn sweep(&self, gone: &[&str], same_packs: bool, act: impl Fn(&Store) -> Result<()>) {
        let undisturbed = copy_of(&*self.before);
        act(&store_on(undisturbed.clone())).unwrap();
        store_on(undisturbed.clone()).gc(AT_ONCE).unwrap();
        for fault in FAULTS {
            let mut operations = 0;
            for n in 0.. {
                let how = format!("{fault:?} at operation {n}");
                let inner = copy_of(&*self.before);
                let faulty =
                    Arc::new(FaultyBackend::new(inner.clone(), move |i, _, _| (i == n).then_some(fault)));
                let done = act(&store_on(faulty.clone()));
                if faulty.operations() <= n {
                    done.unwrap_or_else(|e| panic!("{how}, which was never reached: {e}"));
                    break;
                }
                operations += 1;
                self.check(&inner, gone, &how);
                // Another host does it again, and collects.
                match act(&store_on(inner.clone())) {
                    Err(dormouse_chunkstore::StoreError::NoSuchSnapshot { .. }) if !gone.is_empty() => {}
                    again => again.unwrap_or_else(|e| panic!("{how}, again: {e}")),
                }
                store_on(inner.clone()).gc(AT_ONCE).unwrap_or_else(|e| panic!("{how}, collecting: {e}"));
                self.check(&inner, gone, &how);
                let (left, expected) = (shape(&*inner, same_packs), shape(&*undisturbed, same_packs));
                assert_eq!(left, expected, "{how}: garbage is left, or something is gone");
                let nothing = store_on(inner.clone()).gc(AT_ONCE).unwrap();
                assert_eq!((nothing.live_objects, nothing.deleted_objects), (nothing.objects, 0), "{how}");
            }
            assert!(operations > 1, "{fault:?} was hit {operations} times");
        }
    }

    fn check(&self, backend: &Arc<dyn Backend>, gone: &[&str], how: &str) {
        let store = store_on(backend.clone());
        for (snapshot, machine) in &self.acknowledged {
            if !gone.contains(snapshot) {
                machine.check(&store, snapshot).unwrap_or_else(|e| panic!("{how}: {snapshot}: {e}"));
            }
        }
        let report = store.verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(report.is_clean(), "{how}: {report:?}");
    }
}

/// Every object that is one; a tombstone of a lease or of a name is none. References and roots say how often and when
/// they were written, so of these only the number and the size must agree.
fn shape(backend: &dyn Backend, packs: bool) -> BTreeSet<String> {
    let mut roots = 0;
    let mut shape = BTreeSet::new();
    for (key, bytes) in objects(backend) {
        let named = Named::decode(&Domain::plain(), None, &bytes);
        if bytes.is_empty() || matches!(named, Ok(Named::Removed(_))) {
            continue;
        }
        if key.contains("/roots/") {
            roots += 1;
        } else if packs || !key.contains("/packs/") {
            shape.insert(key);
        }
    }
    shape.insert(format!("{roots} roots"));
    shape
}

#[test]
fn removing() {
    Scene::new().sweep(&["b"], true, |store| store.remove(&name("b")));
}

#[test]
fn collecting() {
    Scene::new().sweep(&[], true, |store| store.gc(AT_ONCE).map(drop));
}

#[test]
fn collecting_when_a_collector_died() {
    let mut scene = Scene::new();
    let inner = copy_of(&*scene.before);
    // It dies at its first deletion, and its lease stays.
    let plan = |_, op: &str, _: &str| (op == "delete").then_some(Fault::Dead);
    store_on(Arc::new(FaultyBackend::new(inner.clone(), plan))).gc(AT_ONCE).unwrap_err();
    let patient = Store::with_backend(inner.clone(), StoreOptions::default());
    assert!(patient.gc(AT_ONCE).unwrap_err().to_string().contains("25 minutes"));
    scene.before = inner;
    scene.sweep(&[], true, |store| store.gc(AT_ONCE).map(drop));
}

#[test]
fn collecting_after_a_grace_time() {
    // The first collection condemns, the second deletes.
    let grace = GcOptions { grace: Duration::from_millis(1), ..AT_ONCE };
    Scene::new().sweep(&[], true, |store| store.gc(grace).and_then(|_| store.gc(grace)).map(drop));
}

#[test]
fn repacking() {
    let options = RepackOptions { level: 3, ..Default::default() };
    Scene::new().sweep(&[], false, |store| store.repack(options, &NoProgress).map(drop));
}

#[test]
fn what_a_dead_writer_announced_is_garbage_when_its_time_is_over() {
    let scene = Scene::new();
    let machine = Machine::unlike(5, 80, 5);
    let clean = copy_of(&*scene.before);
    store_on(clean.clone()).gc(AT_ONCE).unwrap();
    let mut announced = 0;
    for n in 0.. {
        let inner = copy_of(&*scene.before);
        let plan = move |i, _: &str, _: &str| (i == n).then_some(Fault::Dead);
        let faulty = Arc::new(FaultyBackend::new(inner.clone(), plan));
        let done = machine.import(&store_on(faulty.clone()), "e", None);
        if faulty.operations() <= n {
            done.unwrap();
            break;
        }
        let left = objects(&*inner).keys().any(|k| k.contains("/announced/"));
        announced += usize::from(left);
        if left {
            // To a host that does not take it for dead yet, what was announced is not garbage.
            let objects_before = objects(&*inner);
            let patient = Store::with_backend(inner.clone(), StoreOptions::default());
            patient.gc(AT_ONCE).unwrap();
            let now = objects(&*inner);
            let roots = |all: &std::collections::BTreeMap<String, _>| {
                all.keys().filter(|k| k.contains("/announced/")).count()
            };
            assert_eq!(roots(&objects_before), roots(&now), "operation {n}");
        }
        let store = store_on(inner.clone());
        if store.open_snapshot(&name("e")).is_ok() {
            machine.remember().check(&store, "e").unwrap();
            store.remove(&name("e")).unwrap();
        }
        store.gc(AT_ONCE).unwrap();
        scene.check(&inner, &[], &format!("operation {n}"));
        assert_eq!(shape(&*inner, true), shape(&*clean, true), "operation {n}");
    }
    assert!(announced > 1);
}
