//! Any store that the `object_store` crate speaks to.

use std::{
    future::Future,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::{
    Error as OsError, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion,
    path::Path,
};

use super::{
    Backend, MUTABLE_BYTES_MAX, ObjectMeta, PutOutcome, Version,
    classify::{classify, is_no_object},
    runner::Runner,
};
use crate::{
    cancel::unless_cancelled,
    error::{Result, StoreError},
};

/// Attempts of a write that the store refuses as if another had been first, while the object says that none was.
const CONFLICTS_MAX: u32 = 6;
/// The pause after the first of them.
const CONFLICT_PAUSE: Duration = Duration::from_millis(20);

/// An object store behind blocking calls.
#[derive(Debug)]
pub(crate) struct ObjectBackend {
    pub(super) url: String,
    pub(super) prefix: Path,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) runner: Runner,
    /// Whether nobody has to try if this store keeps the conditions of writes.
    pub(super) keeps_conditions: bool,
    /// Whether it has answered anything yet.
    pub(super) worked: AtomicBool,
}

impl ObjectBackend {
    fn path(&self, key: &str) -> Path {
        // The prefix is as the user gave it; encoded once more it would be another.
        key.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), Path::join)
    }

    fn key(&self, path: &Path) -> String {
        let tail = path
            .prefix_match(&self.prefix)
            .map(|parts| parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/"));
        tail.unwrap_or_else(|| path.to_string())
    }

    /// What comes of `request`, which ends early if nobody waits for it any more.
    fn run<T>(&self, request: impl Future<Output = Result<T, OsError>>) -> Result<T, OsError> {
        let done = self.runner.run(unless_cancelled(request));
        done.unwrap_or_else(|cancelled| Err(OsError::Generic { store: "client", source: cancelled.into() }))
    }

    pub(super) fn error(&self, doing: String, error: &OsError) -> StoreError {
        classify(&self.url, doing, error, self.worked.load(Ordering::Relaxed))
    }

    /// A store that refuses a write because of an object that it does not have, every time.
    fn contradicts_itself(&self, doing: String) -> StoreError {
        let why = "it refuses the write as if another one had been first, and there is none".into();
        StoreError::Unavailable { doing, store: self.url.clone(), why }
    }

    /// Notes that the store has answered: from here on, what it is asked with is known to be right.
    fn worked<T, E>(&self, answer: Result<T, E>) -> Result<T, E> {
        if answer.is_ok() {
            self.worked.store(true, Ordering::Relaxed);
        }
        answer
    }

    fn put(&self, key: &str, bytes: Bytes, mode: PutMode) -> Result<PutOutcome, OsError> {
        let update = matches!(mode, PutMode::Update(_));
        let options = PutOptions { mode, ..Default::default() };
        match self.worked(self.run(self.store.put_opts(&self.path(key), bytes.into(), options))) {
            Ok(_) => Ok(PutOutcome::Created),
            Err(OsError::AlreadyExists { .. } | OsError::Precondition { .. }) => Ok(PutOutcome::Exists),
            // An object that was deleted meanwhile. Otherwise it is the bucket that is not there.
            Err(e) if update && is_no_object(&e) => Ok(PutOutcome::Exists),
            Err(e) => Err(e),
        }
    }
}

/// Waits before an attempt that came too close to another one's; longer and longer.
fn pause(attempt: u32) {
    std::thread::sleep(CONFLICT_PAUSE * 2_u32.saturating_pow(attempt));
}

impl Backend for ObjectBackend {
    fn url(&self) -> &str {
        &self.url
    }

    fn keeps_conditions(&self) -> bool {
        self.keeps_conditions
    }

    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        if range.as_ref().is_some_and(|r| r.is_empty()) {
            return Ok(Some(Bytes::new()));
        }
        let start = range.as_ref().map(|r| r.start);
        let options = GetOptions { range: range.map(GetRange::Bounded), ..Default::default() };
        let got = self.run(async {
            match self.store.get_opts(&self.path(key), options).await {
                Ok(result) => result.bytes().await,
                Err(e) => Err(e),
            }
        });
        match self.worked(got) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if is_no_object(&e) => Ok(None),
            Err(e) => {
                // Stores refuse a range that begins past the end, each with an error of its own.
                if let Some(start) = start
                    && let Ok(size) = self.head(key)
                    && size.is_none_or(|size| size <= start)
                {
                    return Ok(size.map(|_| Bytes::new()));
                }
                Err(self.error(format!("reading {key}"), &e))
            }
        }
    }

    fn get_parts(&self, key: &str, range: Range<u64>, each: &mut dyn FnMut(Bytes) -> bool) -> Result<bool> {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..Default::default() };
        let mut begun = false;
        let got = self.run(async {
            let mut parts = self.store.get_opts(&self.path(key), options).await?.into_stream();
            while let Some(part) = parts.next().await {
                begun = true;
                if !each(part?) {
                    break;
                }
            }
            Ok(true)
        });
        match got {
            Ok(there) => Ok(there),
            Err(e) if is_no_object(&e) => Ok(false),
            Err(e) if begun => Err(self.error(format!("reading {key}"), &e)),
            // A range past the end, or a failure: what there is to say of either is said there.
            Err(_) => Ok(self.get(key, Some(range))?.map(each).is_some()),
        }
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        match self.run(self.store.head(&self.path(key))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(e) if is_no_object(&e) => Ok(None),
            Err(e) => Err(self.error(format!("looking up {key}"), &e)),
        }
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        let put = || {
            let put = self.put(key, bytes.clone(), PutMode::Create);
            put.map_err(|e| self.error(format!("writing {key}"), &e))
        };
        for attempt in 0..CONFLICTS_MAX {
            let outcome = match put() {
                // The client does not ask again what may have been done, as when a server reset a connection that had lain
                // idle. Here that does no harm: what may be there then is the same.
                Err(e) if e.is_retryable() => put()?,
                done => done?,
            };
            // "Conflict" is also the answer to two writes at the same moment, neither of which may have been done. Only the
            // object itself tells that from one that was there.
            if outcome == PutOutcome::Created || self.keeps_conditions || self.head(key)?.is_some() {
                return Ok(outcome);
            }
            pause(attempt);
        }
        Err(self.contradicts_itself(format!("writing {key}")))
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        let put = self.put(key, bytes, PutMode::Overwrite);
        put.map(drop).map_err(|e| self.error(format!("rewriting {key}"), &e))
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        let got = self.run(async {
            let result = self.store.get(&self.path(key)).await?;
            let meta = &result.meta;
            let version = Version { e_tag: meta.e_tag.clone(), version: meta.version.clone() };
            if meta.size <= MUTABLE_BYTES_MAX {
                return Ok((result.bytes().await?, version));
            }
            // Not asked for as a range, which stores refuse for a tombstone: what is too much is not read to its end.
            let most = MUTABLE_BYTES_MAX as usize + 1;
            let (mut parts, mut bytes) = (result.into_stream(), BytesMut::new());
            while bytes.len() < most
                && let Some(part) = parts.next().await
            {
                let part = part?;
                bytes.extend_from_slice(&part[..part.len().min(most - bytes.len())]);
            }
            Ok((bytes.freeze(), version))
        });
        match self.worked(got) {
            Ok((bytes, version)) => Ok(((!bytes.is_empty()).then_some(bytes), Some(version))),
            Err(e) if is_no_object(&e) => Ok((None, None)),
            Err(e) => Err(self.error(format!("reading {key}"), &e)),
        }
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let mode = match expected {
            None => PutMode::Create,
            Some(v) => PutMode::Update(UpdateVersion { e_tag: v.e_tag.clone(), version: v.version.clone() }),
        };
        let doing = || format!("moving {key}");
        let mut doubt: Option<StoreError> = None;
        for attempt in 0..CONFLICTS_MAX {
            let failed = match self.put(key, bytes.clone(), mode.clone()) {
                Ok(PutOutcome::Created) => return Ok(true),
                Ok(PutOutcome::Exists) => None,
                Err(e) => Some(self.error(doing(), &e)),
            };
            // Whatever was answered, the object itself says whether the write was done: an answer may be lost, a conflict may be
            // with one's own first attempt, or with a write that was not done either.
            let (now, version) = match self.get_versioned(key) {
                Ok(read) => read,
                Err(e) => return Err(doubt.or(failed).unwrap_or(e)),
            };
            if version.is_some() && now.unwrap_or_default() == bytes {
                return Ok(true);
            }
            let is_as_expected = version.as_ref() == expected;
            match failed {
                // Somebody moved it. If an attempt before may have arrived, it may have been what they moved it from.
                None if !is_as_expected => return doubt.map_or(Ok(false), Err),
                None => {}
                Some(e) if !is_as_expected || !e.is_retryable() => return Err(e),
                Some(e) => match doubt {
                    None => doubt = Some(e),
                    Some(first) => return Err(first),
                },
            }
            pause(attempt);
        }
        Err(doubt.unwrap_or_else(|| self.contradicts_itself(doing())))
    }

    fn delete(&self, key: &str) -> Result<()> {
        match self.run(self.store.delete(&self.path(key))) {
            Ok(()) => Ok(()),
            Err(e) if is_no_object(&e) => Ok(()),
            Err(e) => Err(self.error(format!("deleting {key}"), &e)),
        }
    }

    fn folders(&self) -> Result<Vec<String>> {
        let listed = self.runner.run(self.store.list_with_delimiter(Some(&self.prefix)));
        let listed = listed.map_err(|e| self.error("listing the store".into(), &e))?;
        Ok(listed.common_prefixes.iter().map(|path| self.key(path)).collect())
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        let path = self.path(prefix);
        let listed = self.run(async {
            let mut stream = self.store.list(Some(&path));
            while let Some(meta) = stream.next().await {
                let m = self.worked(meta)?;
                each(ObjectMeta {
                    key: self.key(&m.location),
                    bytes: m.size,
                    modified_unix_ms: m.last_modified.timestamp_millis().max(0) as u64,
                });
            }
            Ok(())
        });
        // Of a listing, only the bucket can be missing: without it nothing is known to be there or not.
        listed.map_err(|e| self.error(format!("listing {prefix}"), &e))
    }
}
