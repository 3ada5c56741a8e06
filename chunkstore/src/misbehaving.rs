//! Stores that do not do what they should: ignored conditions, conflicts where nothing was written, listings that leave out,
//! clocks that differ, and answers that no other attempt will change.

use std::{io::Write, path::Path, sync::Arc, time::Duration};

use dormouse_core::{ImageId, ImageKind, Name};

use crate::{
    GcOptions, GcReport, ImageSource, ImportRequest, NoProgress, Result, Store, StoreError, StoreOptions,
    UnreadableKind, VerifyDepth,
    backend::{
        Backend, PutOutcome,
        fake_s3::{FakeS3, Faults},
        object::ObjectBackend,
    },
};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

fn store(server: &FakeS3) -> Store {
    Store::with_backend(server.backend(), StoreOptions::default())
}

fn store_with_cache(server: &FakeS3, cache: &Path) -> Store {
    let cache_dir = Some(cache.to_owned());
    Store::with_backend(server.backend(), StoreOptions { cache_dir, ..Default::default() })
}

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

/// Imports pages of this content, as a new name unless `replace`.
fn import_bytes(store: &Store, to: &str, content: u8, replace: bool) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[content; 20 * 4096]).unwrap();
    let mut request = ImportRequest::new(name(to));
    let (id, path) = (ImageId::new("memory").unwrap(), file.path().to_owned());
    request.images = vec![ImageSource { id, kind: ImageKind::Memory, path, dirty: None }];
    request.replace = replace;
    store.import(&request, &NoProgress).map(drop)
}

fn import(store: &Store, to: &str) -> Result<()> {
    import_bytes(store, to, 7, false)
}

fn is_whole(server: &FakeS3) {
    let report = store(server).verify(None, VerifyDepth::Content, &NoProgress).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

fn gc(server: &FakeS3) -> Result<GcReport> {
    store(server).gc(AT_ONCE)
}

mod conditions {
    use super::*;

    fn trials(server: &FakeS3) -> Vec<String> {
        let mut asked = server.take_asked();
        asked.retain(|asked| asked.contains("-conditions-"));
        asked
    }

    #[test]
    fn a_store_that_ignores_them_is_refused() {
        for faults in [
            Faults { ignores_create: true, ..Default::default() },
            Faults { ignores_replace: true, ..Default::default() },
        ] {
            let server = FakeS3::default();
            server.misbehave(faults.clone());
            let error = import(&store(&server), "a").unwrap_err();
            assert!(matches!(error, StoreError::Unsupported { .. }), "{faults:?}: {error}");
            assert!(!error.is_retryable());
            assert_eq!(server.keys(), Vec::<String>::new(), "{faults:?}: nothing was stored");
        }
    }

    #[test]
    fn every_kind_of_writer_tries_them_first() {
        let server = FakeS3::default();
        import(&store(&server), "a").unwrap();
        server.misbehave(Faults { ignores_create: true, ..Default::default() });
        let before = server.keys();
        for error in [store(&server).remove(&name("a")).unwrap_err(), gc(&server).unwrap_err()] {
            assert!(matches!(error, StoreError::Unsupported { .. }), "{error}");
        }
        assert_eq!(server.keys(), before);
    }

    #[test]
    fn they_are_tried_once_by_a_host() {
        let (server, cache) = (FakeS3::default(), tempfile::tempdir().unwrap());
        import(&store_with_cache(&server, cache.path()), "a").unwrap();
        // Made, not made again, looked up and read; replaced, not replaced, and read. Its deletion does not name it.
        assert_eq!(trials(&server).len(), 7);
        let again = store_with_cache(&server, cache.path());
        import(&again, "b").unwrap();
        again.remove(&name("a")).unwrap();
        assert_eq!(trials(&server), Vec::<String>::new());
    }

    #[test]
    fn stores_that_are_known_to_keep_them_are_not_tried() {
        for url in ["memory://", tempfile::tempdir().unwrap().path().to_str().unwrap()] {
            assert!(crate::backend::open_url(url).unwrap().keeps_conditions(), "{url}");
        }
    }
}

mod conflicts {
    use super::*;

    /// A server all of whose conditional writes are conflicts the first time, though nobody else writes.
    fn server() -> FakeS3 {
        let server = FakeS3::default();
        server.misbehave(Faults { conflicts_once: Some(""), ..Default::default() });
        server
    }

    #[test]
    fn an_import_goes_on_through_them() {
        let server = server();
        import(&store(&server), "a").unwrap();
        assert_eq!(server.take_unconditional(), Vec::<String>::new(), "nothing was taken for damaged");
        import_bytes(&store(&server), "a", 8, true).unwrap();
        store(&server).remove(&name("a")).unwrap();
        gc(&server).unwrap();
        is_whole(&server);
    }

    #[test]
    fn those_that_never_end_are_no_loss_of_a_race() {
        let server = FakeS3::default();
        server.misbehave(Faults { conflicts_always: Some("/refs/"), ..Default::default() });
        let error = import(&store(&server), "a").unwrap_err();
        assert!(matches!(error, StoreError::InDoubt { .. }), "{error:?}");
        server.misbehave(Faults { conflicts_always: Some("/packs/"), ..Default::default() });
        let error = import_bytes(&store(&server), "a", 8, false).unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
        assert_eq!(server.take_unconditional(), Vec::<String>::new());
    }

    #[test]
    fn an_object_that_is_there_exists() {
        let backend: Arc<ObjectBackend> = server().backend();
        assert_eq!(backend.put_new("x", "1".into()).unwrap(), PutOutcome::Created);
        assert_eq!(backend.put_new("x", "2".into()).unwrap(), PutOutcome::Exists);
        assert!(backend.swap("y", None, "1".into()).unwrap());
        assert!(!backend.swap("y", None, "2".into()).unwrap());
    }

    #[test]
    fn a_lost_answer_is_looked_up() {
        let server = FakeS3::default();
        server.misbehave(Faults { loses_answer: Some(""), ..Default::default() });
        import(&store(&server), "a").unwrap();
        is_whole(&server);
    }

    #[test]
    fn what_a_collector_could_not_mark_it_does_not_delete() {
        let server = FakeS3::default();
        import(&store(&server), "n").unwrap();
        store(&server).remove(&name("n")).unwrap();
        server.misbehave(Faults { conflicts_once: Some("/condemned/"), ..Default::default() });
        let other = server.clone();
        // The same pages: they are shared unless a mark says that they go.
        server.before_delete("/packs/", move || import(&store(&other), "m").unwrap());
        assert!(gc(&server).unwrap().deleted_objects > 0);
        is_whole(&server);
        store(&server).open_snapshot(&name("m")).unwrap();
        // Where no mark can be made, nothing goes.
        store(&server).remove(&name("m")).unwrap();
        server.misbehave(Faults { conflicts_always: Some("/condemned/"), ..Default::default() });
        let before = server.keys();
        gc(&server).unwrap_err();
        assert_eq!(server.keys(), before);
    }
}

mod lease {
    use super::*;

    const LEASE: &str = "plain/gc/lease";

    /// A server with the lease of a collector on another host.
    fn held() -> FakeS3 {
        let server = FakeS3::default();
        import(&store(&server), "a").unwrap();
        assert!(server.backend().swap(LEASE, None, "elsewhere/1/1 0".into()).unwrap());
        server
    }

    #[test]
    fn one_that_a_listing_leaves_out_is_not_over() {
        let server = held();
        server.misbehave(Faults { hides: Some("lease"), ..Default::default() });
        let error = gc(&server).unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
        let lease = server.backend().get_versioned(LEASE).unwrap().0.unwrap();
        assert_eq!(lease, "elsewhere/1/1 0");
    }

    #[test]
    fn one_of_ones_own_that_is_left_out_is_given_back() {
        let server = FakeS3::default();
        import(&store(&server), "a").unwrap();
        server.misbehave(Faults { hides: Some("lease"), ..Default::default() });
        assert!(matches!(gc(&server), Err(StoreError::Unavailable { .. })));
        server.misbehave(Faults::default());
        gc(&server).unwrap();
    }

    #[test]
    fn clocks_that_differ_by_ten_minutes_do_not_end_it() {
        let server = held();
        // Renewed half a lease ago at the latest by who has it, and written by a node that is ten minutes behind.
        server.pass(7 * 60 + 30);
        server.pass(10 * 60);
        let error = gc(&server).unwrap_err();
        assert!(matches!(error, StoreError::Busy { .. }), "{error:?}");
        server.pass(8 * 60);
        gc(&server).unwrap();
    }

    #[test]
    fn a_snapshot_does_not_expire_early_by_a_clock_ahead() {
        let server = FakeS3::default();
        let store = store(&server);
        import(&store, "a").unwrap();
        let (mut reference, version) = store.reference(&name("a")).unwrap();
        // The server's noon, and five minutes.
        let noon_ms = 1_767_268_800_000;
        reference.as_mut().unwrap().expires_unix_ms = noon_ms + 300_000;
        store.swap_reference(&name("a"), version.as_ref(), &reference.unwrap()).unwrap();
        server.pass(14 * 60);
        assert_eq!(gc(&server).unwrap().expired, Vec::<String>::new());
        server.pass(2 * 60);
        assert_eq!(gc(&server).unwrap().expired, ["a"]);
    }
}

mod answers {
    use super::*;

    /// The error of an import whose requests are all answered like this, and how many requests there were.
    fn error_of(status: u16, code: &'static str) -> (StoreError, usize) {
        let server = FakeS3::default();
        server.misbehave(Faults { answers: Some((status, code)), ..Default::default() });
        let error = import(&store(&server), "a").unwrap_err();
        (error, server.take_asked().len())
    }

    #[test]
    fn those_that_do_not_pass_are_not_asked_for_again() {
        type Is = fn(&StoreError) -> bool;
        let no_store: Is = |e| matches!(e, StoreError::NoSuchStore { .. });
        let config: Is = |e| matches!(e, StoreError::Config { .. });
        let full: Is = |e| matches!(e, StoreError::Full { .. });
        let denied: Is = |e| matches!(e, StoreError::Denied { .. });
        let unsupported: Is = |e| matches!(e, StoreError::Unsupported { .. });
        let archived: Is = |e| matches!(e, StoreError::Archived { .. });
        for (status, code, is) in [
            (404, "NoSuchBucket", no_store),
            (501, "NotImplemented", unsupported),
            (301, "PermanentRedirect", config),
            (400, "AuthorizationHeaderMalformed", config),
            (400, "QuotaExceeded", full),
            (403, "QuotaExceeded", full),
            (507, "InsufficientStorage", full),
            (403, "AccessDenied", denied),
            (400, "ExpiredToken", denied),
            (403, "InvalidObjectState", archived),
            (409, "BlobArchived", archived),
        ] {
            let (error, asked) = error_of(status, code);
            assert!(is(&error), "{status} {code}: {error:?}");
            assert!(!error.is_retryable(), "{status} {code}");
            assert_eq!(asked, 1, "{status} {code}");
        }
    }

    #[test]
    fn an_object_in_an_archive_tier_is_told_as_that() {
        let server = FakeS3::default();
        import(&store(&server), "a").unwrap();
        for part in ["/refs/", "/roots/", "/packs/"] {
            server.misbehave(Faults { archived: Some(part), ..Default::default() });
            let report = store(&server).verify(None, VerifyDepth::Structure, &NoProgress).unwrap();
            assert!(report.damages.is_empty(), "{part}: {report:?}");
            let [archived] = &report.unreadable[..] else { panic!("{part}: {report:?}") };
            assert!(archived.object.contains(part), "{part}: {archived:?}");
            assert_eq!(archived.kind, UnreadableKind::Archived);
            assert!(archived.why.contains("restore it from the archive tier"), "{}", archived.why);
        }
        let error = store(&server).open_snapshot(&name("a")).and_then(|s| s.load_sections()).unwrap_err();
        assert!(matches!(error, StoreError::Archived { .. }), "{error:?}");
    }

    #[test]
    fn those_that_pass_are_asked_for_again() {
        for (status, code) in [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")] {
            let (error, asked) = error_of(status, code);
            assert!(matches!(error, StoreError::Unavailable { .. }), "{status} {code}: {error:?}");
            assert!(asked > 1, "{status} {code}");
        }
    }

    #[test]
    fn without_a_bucket_nothing_is_known_to_be_missing() {
        let server = FakeS3::default();
        server.misbehave(Faults { answers: Some((404, "NoSuchBucket")), ..Default::default() });
        let error = store(&server).list().unwrap_err();
        assert!(matches!(error, StoreError::NoSuchStore { .. }), "{error:?}");
        let error = store(&server).open_snapshot(&name("a")).unwrap_err();
        assert!(matches!(error, StoreError::NoSuchStore { .. }), "{error:?}");
    }
}
