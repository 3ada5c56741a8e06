//! Collectors, repackers and writers that are stopped in the middle, with the machine they run on, and go on when others
//! have long taken them for dead: whatever was acknowledged meanwhile stays.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use common::{Machine, files_below, fresh};
use dormouse_chunkstore::{
    GcOptions, NoProgress, RepackOptions, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{
        Backend,
        faulty::{Fault, FaultyBackend},
        open_url,
    },
};
use dormouse_core::Name;

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };
const HOUR: Duration = Duration::from_secs(3600);

/// Where somebody is stopped until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    reached: bool,
    open: bool,
    /// Whoever was to be stopped is done.
    over: bool,
}

impl Gate {
    fn stop_here(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.reached = true;
        changed.notify_all();
        drop(changed.wait_while(state, |state| !state.open).unwrap());
    }

    fn wait_until_somebody_is_stopped(&self) {
        let (state, changed) = &*self.0;
        let state = changed.wait_while(state.lock().unwrap(), |state| !state.reached && !state.over).unwrap();
        assert!(state.reached, "nobody came by");
    }

    /// Does what is to be stopped.
    fn pass<T>(&self, act: impl FnOnce() -> T) -> T {
        let done = act();
        self.0.0.lock().unwrap().over = true;
        self.0.1.notify_all();
        done
    }

    fn open(&self) {
        let (state, changed) = &*self.0;
        state.lock().unwrap().open = true;
        changed.notify_all();
    }
}

struct Scene {
    dir: tempfile::TempDir,
    backend: Arc<dyn Backend>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backend = open_url(dir.path().to_str().unwrap()).unwrap();
        Scene { dir, backend }
    }

    fn store(&self) -> Store {
        fresh(&self.backend, None)
    }

    /// A store whose user is stopped at the operation that `at` tells.
    fn stopped_at(
        &self,
        gate: &Gate,
        at: impl Fn(&str, &str) -> bool + Send + Sync + 'static,
    ) -> (Arc<FaultyBackend>, Store) {
        let gate = gate.clone();
        let backend = Arc::new(FaultyBackend::new(self.backend.clone(), move |_, op, key| {
            if at(op, key) {
                gate.stop_here();
            }
            None
        }));
        (backend.clone(), Store::with_backend(backend, StoreOptions::default()))
    }

    fn path(&self, key: &str) -> std::path::PathBuf {
        self.dir.path().join("plain").join(key)
    }

    /// As if that much time had passed since the objects below `key` were written.
    fn age(&self, key: &str, by: Duration) {
        let path = self.path(key);
        let files = if path.is_dir() { files_below(&path) } else { vec![path] };
        assert!(!files.is_empty(), "{key}");
        for file in files {
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_modified(SystemTime::now() - by).unwrap();
        }
    }

    /// Does `meanwhile` between a collector's look at its lease and its first deletion of a pack; it goes on after that. Its
    /// lease is long over by then.
    fn while_a_collector_is_stopped(&self, meanwhile: impl FnOnce()) {
        let gate = Gate::default();
        let (_, slow) = self.stopped_at(&gate, |op, key| op == "delete" && key.contains("/packs/"));
        thread::scope(|scope| {
            let slow = scope.spawn(|| gate.pass(|| slow.gc(AT_ONCE)));
            gate.wait_until_somebody_is_stopped();
            self.age("gc/lease", HOUR);
            meanwhile();
            gate.open();
            let _ = slow.join().unwrap();
        });
    }

    fn check(&self, machine: &Machine, name: &str) {
        machine.remember().check(&self.store(), name).unwrap();
        let report = self.store().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

fn is_there(folder: &Path) -> bool {
    folder.is_dir() && !files_below(folder).is_empty()
}

#[test]
fn a_collector_that_goes_on_deletes_nothing_that_was_stored_again_meanwhile() {
    let scene = Scene::new();
    let machine = Machine::new(60, 8);
    machine.import(&scene.store(), "a", None).unwrap();
    scene.store().remove(&name("a")).unwrap();
    scene.while_a_collector_is_stopped(|| {
        let report = scene.store().gc(AT_ONCE).unwrap();
        assert!(report.deleted_objects >= 2, "{report:?}");
        // The same pages make the same packs, which the first collector is still about to delete.
        machine.import(&scene.store(), "b", None).unwrap();
    });
    scene.check(&machine, "b");
    // What protects from a predecessor stands for a week, and goes then.
    scene.store().gc(AT_ONCE).unwrap();
    assert!(is_there(&scene.path("condemned")));
    scene.age("condemned", 7 * 24 * HOUR + HOUR);
    let report = scene.store().gc(AT_ONCE).unwrap();
    assert!(!is_there(&scene.path("condemned")), "{report:?}: {:?}", files_below(&scene.path("condemned")));
    scene.check(&machine, "b");
}

#[test]
fn a_collector_that_lost_its_lease_finds_out_before_it_deletes_anything() {
    let scene = Scene::new();
    Machine::new(60, 8).import(&scene.store(), "a", None).unwrap();
    scene.store().remove(&name("a")).unwrap();
    let (gate, rounds) = (Gate::default(), AtomicU64::new(0));
    // The second look at announcements is after everything was condemned.
    let (asked, slow) = scene.stopped_at(&gate, move |op, key| {
        op == "list" && key.ends_with("announced") && rounds.fetch_add(1, Ordering::SeqCst) == 1
    });
    thread::scope(|scope| {
        let slow = scope.spawn(|| gate.pass(|| slow.gc(AT_ONCE)));
        gate.wait_until_somebody_is_stopped();
        scene.age("gc/lease", HOUR);
        scene.store().gc(AT_ONCE).unwrap();
        asked.counts().take();
        gate.open();
        assert!(matches!(slow.join().unwrap(), Err(StoreError::Conflict { .. })));
    });
    assert_eq!(asked.counts().take().deletes, 0);
}

#[test]
fn a_collector_that_goes_on_is_reckoned_with_after_a_repacker_had_its_lease() {
    let scene = Scene::new();
    let (machine, other) = (Machine::new(60, 8), Machine::unlike(3, 20, 2));
    other.import(&scene.store(), "other", None).unwrap();
    machine.import(&scene.store(), "a", None).unwrap();
    scene.store().remove(&name("a")).unwrap();
    scene.while_a_collector_is_stopped(|| {
        // It takes the lease over from who is stopped, and gives it back; the next collector need not wait.
        scene.store().repack(RepackOptions { level: 1, ..Default::default() }, &NoProgress).unwrap();
        scene.store().gc(AT_ONCE).unwrap();
        machine.import(&scene.store(), "b", None).unwrap();
    });
    scene.check(&machine, "b");
}

/// A repacker stopped at `op` on `key`, while another host collects at once.
fn repacker_is_stopped(op: &'static str, key: &'static str) {
    let scene = Scene::new();
    let machine = Machine::new(60, 8);
    machine.import(&scene.store(), "a", None).unwrap();
    let gate = Gate::default();
    let (_, slow) = scene.stopped_at(&gate, move |o, k| o == op && k.contains(key));
    let moved = thread::scope(|scope| {
        let options = RepackOptions { level: 1, ..Default::default() };
        let (gate, slow) = (&gate, &slow);
        let slow = scope.spawn(move || gate.pass(|| slow.repack(options, &NoProgress)));
        gate.wait_until_somebody_is_stopped();
        scene.age("gc/lease", HOUR);
        scene.store().gc(AT_ONCE).unwrap();
        gate.open();
        slow.join().unwrap()
    });
    assert!(matches!(moved, Ok(_) | Err(StoreError::Conflict { .. })), "{moved:?}");
    scene.check(&machine, "a");
    scene.store().gc(AT_ONCE).unwrap();
    scene.check(&machine, "a");
}

#[test]
fn a_repacker_that_goes_on_points_no_name_to_what_was_collected_meanwhile() {
    repacker_is_stopped("swap", "/refs/");
}

#[test]
fn a_repacker_that_goes_on_before_it_announced_anything_moves_no_name() {
    repacker_is_stopped("put", "/announced/");
}

#[test]
fn a_collector_that_goes_on_deletes_nothing_that_a_second_repacking_made() {
    let scene = Scene::new();
    let machine = Machine::new(60, 8);
    machine.import(&scene.store(), "a", None).unwrap();
    let options = RepackOptions { level: 1, ..Default::default() };
    // The first one has stored all it made when it dies, and no name stands for it.
    let dying = FaultyBackend::new(scene.backend.clone(), |_, op, key| {
        (op == "put" && key.contains("/announced/")).then_some(Fault::Fail)
    });
    let dying = Store::with_backend(Arc::new(dying), StoreOptions::default());
    assert!(matches!(dying.repack(options, &NoProgress), Err(StoreError::Unavailable { .. })));
    scene.while_a_collector_is_stopped(|| {
        // The same pages and the same level: what it makes must not be what is about to be deleted.
        assert_eq!(scene.store().repack(options, &NoProgress).unwrap().moved_snapshots, 1);
    });
    scene.check(&machine, "a");
    scene.store().gc(AT_ONCE).unwrap();
    scene.check(&machine, "a");
}

#[test]
fn a_writer_that_goes_on_hours_later_finds_what_it_stored() {
    for (parent, new) in [(None, "b"), (Some("a"), "a")] {
        let scene = Scene::new();
        let mut machine = Machine::new(60, 8);
        machine.import(&scene.store(), "a", None).unwrap();
        machine.change(1, 20);
        let gate = Gate::default();
        let (_, slow) = scene.stopped_at(&gate, |op, key| op == "swap" && key.contains("/refs/"));
        thread::scope(|scope| {
            let slow = scope.spawn(|| gate.pass(|| machine.import(&slow, new, parent)));
            gate.wait_until_somebody_is_stopped();
            scene.age("announced", 5 * HOUR);
            scene.store().gc(AT_ONCE).unwrap();
            gate.open();
            slow.join().unwrap().unwrap();
        });
        scene.check(&machine, new);
    }
}
