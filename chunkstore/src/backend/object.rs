//! Any store that the `object_store` crate speaks to.

use std::{ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::{
    Error as OsError, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion,
    path::Path,
};

use super::{Backend, MUTABLE_BYTES_MAX, ObjectMeta, PutOutcome, Version, runner::Runner};
use crate::error::{Result, StoreError};

/// An object store behind blocking calls.
#[derive(Debug)]
pub(super) struct ObjectBackend {
    pub(super) url: String,
    pub(super) prefix: Path,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) runner: Runner,
}

impl ObjectBackend {
    fn path(&self, key: &str) -> Path {
        let parts = self.prefix.parts().map(|p| p.as_ref().to_owned());
        Path::from_iter(parts.chain(key.split('/').map(str::to_owned)))
    }

    fn key(&self, path: &Path) -> String {
        let tail = path
            .prefix_match(&self.prefix)
            .map(|parts| parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/"));
        tail.unwrap_or_else(|| path.to_string())
    }

    pub(super) fn error(&self, doing: String, error: OsError) -> StoreError {
        let store = self.url.clone();
        if io_kind(&error).is_some_and(is_full) {
            return StoreError::Full { doing };
        }
        let denied = io_kind(&error).is_some_and(is_denied);
        let why = root_cause(&error);
        match error {
            OsError::PermissionDenied { .. } | OsError::Unauthenticated { .. } => {
                StoreError::Denied { doing, store, why }
            }
            _ if denied => StoreError::Denied { doing, store, why },
            _ => StoreError::Unavailable { doing, store, why },
        }
    }

    fn put(&self, key: &str, bytes: Bytes, mode: PutMode) -> Result<PutOutcome, OsError> {
        let update = matches!(mode, PutMode::Update(_));
        let options = PutOptions { mode, ..Default::default() };
        match self.runner.run(self.store.put_opts(&self.path(key), bytes.into(), options)) {
            Ok(_) => Ok(PutOutcome::Created),
            Err(OsError::AlreadyExists { .. } | OsError::Precondition { .. }) => Ok(PutOutcome::Exists),
            // An object that was deleted meanwhile. Otherwise it is the bucket that is not there.
            Err(OsError::NotFound { .. }) if update => Ok(PutOutcome::Exists),
            Err(e) => Err(e),
        }
    }
}

fn is_full(kind: std::io::ErrorKind) -> bool {
    matches!(kind, std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

fn is_denied(kind: std::io::ErrorKind) -> bool {
    matches!(kind, std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem)
}

/// The I/O error at the bottom of an error, if there is one.
fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<std::io::ErrorKind> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(io) = e.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        next = e.source();
    }
    None
}

/// The error's own words and the deepest cause, which is what a person can act on.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        let cause = e.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = e.source();
    }
    text.chars().take(600).collect()
}

impl Backend for ObjectBackend {
    fn url(&self) -> &str {
        &self.url
    }

    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        if range.as_ref().is_some_and(|r| r.is_empty()) {
            return Ok(Some(Bytes::new()));
        }
        let start = range.as_ref().map(|r| r.start);
        let options = GetOptions { range: range.map(GetRange::Bounded), ..Default::default() };
        let got = self.runner.run(async {
            match self.store.get_opts(&self.path(key), options).await {
                Ok(result) => result.bytes().await,
                Err(e) => Err(e),
            }
        });
        match got {
            Ok(bytes) => Ok(Some(bytes)),
            Err(OsError::NotFound { .. }) => Ok(None),
            Err(e) => {
                // Stores refuse a range that begins past the end, each with an error of its own.
                if let Some(start) = start
                    && let Ok(size) = self.head(key)
                    && size.is_none_or(|size| size <= start)
                {
                    return Ok(size.map(|_| Bytes::new()));
                }
                Err(self.error(format!("reading {key}"), e))
            }
        }
    }

    fn get_parts(&self, key: &str, range: Range<u64>, each: &mut dyn FnMut(Bytes) -> bool) -> Result<bool> {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..Default::default() };
        let mut begun = false;
        let got = self.runner.run(async {
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
            Err(OsError::NotFound { .. }) => Ok(false),
            Err(e) if begun => Err(self.error(format!("reading {key}"), e)),
            // A range past the end, or a failure: what there is to say of either is said there.
            Err(_) => Ok(self.get(key, Some(range))?.map(each).is_some()),
        }
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        match self.runner.run(self.store.head(&self.path(key))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(OsError::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error(format!("looking up {key}"), e)),
        }
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        let put = || {
            let put = self.put(key, bytes.clone(), PutMode::Create);
            put.map_err(|e| self.error(format!("writing {key}"), e))
        };
        match put() {
            // The client does not ask again what may have been done, as when a server reset a connection that had lain
            // idle. Here that does no harm: what may be there then is the same.
            Err(e) if e.is_retryable() => put(),
            done => done,
        }
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        let put = self.put(key, bytes, PutMode::Overwrite);
        put.map(drop).map_err(|e| self.error(format!("rewriting {key}"), e))
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        let got = self.runner.run(async {
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
        match got {
            Ok((bytes, version)) => Ok(((!bytes.is_empty()).then_some(bytes), Some(version))),
            Err(OsError::NotFound { .. }) => Ok((None, None)),
            Err(e) => Err(self.error(format!("reading {key}"), e)),
        }
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let mode = match expected {
            None => PutMode::Create,
            Some(v) => PutMode::Update(UpdateVersion { e_tag: v.e_tag.clone(), version: v.version.clone() }),
        };
        let doing = || format!("moving {key}");
        match self.put(key, bytes.clone(), mode.clone()) {
            Ok(PutOutcome::Created) => Ok(true),
            // Either somebody was first, or our own first attempt arrived and its answer did not.
            Ok(PutOutcome::Exists) => Ok(self.get_versioned(key)?.0.unwrap_or_default() == bytes),
            Err(e) => {
                let error = self.error(doing(), e);
                // The answer was lost; the object itself says whether the write was.
                let Ok((now, version)) = self.get_versioned(key) else { return Err(error) };
                if now.unwrap_or_default() == bytes {
                    return Ok(true);
                }
                if !error.is_retryable() || version.as_ref() != expected {
                    return Err(error);
                }
                match self.put(key, bytes.clone(), mode) {
                    Ok(PutOutcome::Created) => Ok(true),
                    // The first one was still on its way.
                    Ok(PutOutcome::Exists) => Ok(self.get_versioned(key)?.0.unwrap_or_default() == bytes),
                    Err(_) => Err(error),
                }
            }
        }
    }

    fn delete(&self, key: &str) -> Result<()> {
        match self.runner.run(self.store.delete(&self.path(key))) {
            Ok(()) | Err(OsError::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.error(format!("deleting {key}"), e)),
        }
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        let path = self.path(prefix);
        self.runner.run(async {
            let mut stream = self.store.list(Some(&path));
            while let Some(meta) = stream.next().await {
                match meta {
                    Ok(m) => each(ObjectMeta {
                        key: self.key(&m.location),
                        bytes: m.size,
                        modified_unix_ms: m.last_modified.timestamp_millis().max(0) as u64,
                    }),
                    // Deleted between the listing and the look at it.
                    Err(OsError::NotFound { .. }) => {}
                    Err(e) => return Err(self.error(format!("listing {prefix}"), e)),
                }
            }
            Ok(())
        })
    }
}
