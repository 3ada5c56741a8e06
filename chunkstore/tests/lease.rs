//! The lease of a collector that is ended in the middle, by a signal or by `kill -9`: the next one need not wait for it.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::{Machine, fresh};
use dormouse_chunkstore::{
    GcOptions, Store, StoreError, StoreOptions,
    backend::{faulty::FaultyBackend, open_url},
};
use dormouse_core::Name;

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };
/// Set in a process that is to die.
const DIES_IN: &str = "DORMOUSE_TEST_COLLECTOR_DIES_IN";

/// A store in which something waits to be collected.
fn with_garbage(dir: &Path) -> Store {
    let store = fresh(&open_url(dir.to_str().unwrap()).unwrap(), None);
    Machine::new(60, 8).import(&store, "a", None).unwrap();
    store.remove(&Name::new("a").unwrap()).unwrap();
    store
}

/// A store whose user does `act` when it is about to delete a pack.
fn interrupted(dir: &Path, act: impl Fn() + Send + Sync + 'static) -> Store {
    let inner = open_url(dir.to_str().unwrap()).unwrap();
    let backend = FaultyBackend::new(inner, move |_, op, key| {
        if op == "delete" && key.contains("/packs/") {
            act();
        }
        None
    });
    Store::with_backend(Arc::new(backend), StoreOptions::default())
}

#[test]
fn one_that_is_given_back_makes_nobody_wait() {
    let dir = tempfile::tempdir().unwrap();
    let next = with_garbage(dir.path());
    let (ended, given_back) = (Arc::new(OnceLock::<Store>::new()), Arc::new(AtomicBool::new(false)));
    let store = interrupted(dir.path(), {
        let (ended, given_back) = (ended.clone(), given_back.clone());
        move || {
            if ended.get().unwrap().give_back_lease().unwrap() {
                given_back.store(true, Ordering::SeqCst);
            }
        }
    });
    ended.set(store.clone()).unwrap();
    // Were it not killed, it would find out.
    assert!(matches!(store.gc(AT_ONCE), Err(StoreError::Conflict { .. })));
    assert!(given_back.load(Ordering::SeqCst));
    next.gc(AT_ONCE).unwrap();
    assert!(!next.give_back_lease().unwrap(), "there is none any more");
}

#[test]
fn one_of_a_killed_process_is_taken_over() {
    if let Some(dir) = env::var_os(DIES_IN) {
        let _ = interrupted(Path::new(&dir), || std::process::abort()).gc(AT_ONCE);
        panic!("it was to die");
    }
    let dir = tempfile::tempdir().unwrap();
    let next = with_garbage(dir.path());
    let died = Command::new(env::current_exe().unwrap())
        .args(["one_of_a_killed_process_is_taken_over", "--exact"])
        .env(DIES_IN, dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(6), "{died}");
    let lease = std::fs::read_to_string(dir.path().join("plain/gc/lease")).unwrap();
    assert_eq!(lease.split(' ').next().unwrap().split('/').count(), 6, "{lease}");
    next.gc(AT_ONCE).unwrap();
    // One of a process that lives is respected, and so is one that says no more than older versions do.
    let mine = next.gc(AT_ONCE);
    assert!(mine.is_ok(), "{mine:?}");
    std::fs::write(dir.path().join("plain/gc/lease"), "host/1/1 0").unwrap();
    let error = next.gc(AT_ONCE).unwrap_err();
    assert!(matches!(error, StoreError::Busy { .. }) && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("process 1 on host"), "{error}");
}
