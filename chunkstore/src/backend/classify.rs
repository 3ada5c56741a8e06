//! What an error of a store's client means: whether it passes, and what to do about it if not.
//!
//! Clients tell most errors by one name. What a person has to mend, and no other attempt will, is told here by the codes that
//! stores give in their answers.

use std::{error::Error, io};

use object_store::Error as OsError;

use super::http::Refused;
use crate::error::StoreError;

/// The bucket or container is missing: S3, Google's XML API, Azure.
const NO_STORE: &[&str] = &["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"];
/// There is no room left by somebody's rule.
const NO_ROOM: &[&str] = &["QuotaExceeded", "StorageFull", "InsufficientStorage"];
/// The credentials are too old or none. Some stores say so with the status of a malformed request.
const NO_RIGHT: &[&str] = &["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId"];
/// How the client tells of such answers to requests that are not of one object, such as listings.
const NO_RIGHT_STATUS: &[&str] = &["status code: 401", "status code: 403"];
/// The object was moved to an archive tier: S3, Azure.
const ARCHIVED: &[&str] = &["InvalidObjectState", "BlobArchived"];
/// The bucket is in another region, or at another endpoint.
const ELSEWHERE: &[&str] = &[
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "Received redirect without LOCATION",
];
/// Where clients ask for credentials that they were not given: the metadata services of clouds.
const METADATA: &[&str] =
    &["//169.254.169.254", "//169.254.170.2", "//metadata.google.internal", "//metadata/"];
/// Most characters of an answer in a message.
const WHY_CHARS_MAX: usize = 600;

const REGION: &str = "set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to the server that has it";
const PLAIN_HTTP: &str =
    "set AWS_ALLOW_HTTP=true, or AZURE_ALLOW_HTTP=true, to speak to it without encryption, or use https://";

/// What `error` means that came up `doing` something with the store at `url`. `worked`: the store has answered before, so
/// that credentials were found.
pub(super) fn classify(url: &str, doing: String, error: &OsError, worked: bool) -> StoreError {
    let store = url.to_owned();
    let io = io_kind(error);
    let said = whole_text(error);
    let says = |codes: &[&str]| codes.iter().any(|code| said.contains(code));
    let refused = find::<Refused>(error).map(|refused| refused.status);
    let mut why: String = said.chars().take(WHY_CHARS_MAX).collect();
    if io.is_some_and(is_full) || refused == Some(507) || says(NO_ROOM) {
        return StoreError::Full { doing };
    }
    if is_no_store(error) {
        return StoreError::NoSuchStore { store, why };
    }
    if says(ARCHIVED) {
        return StoreError::Archived { doing, store, why };
    }
    if says(ELSEWHERE) {
        return StoreError::Config { doing, store, why, remedy: REGION };
    }
    if is_plain_http(&said) {
        return StoreError::Config { doing, store, why, remedy: PLAIN_HTTP };
    }
    if says(METADATA) && !worked {
        why.insert_str(0, "no credentials were given, and this machine has none of its own: ");
        return StoreError::Denied { doing, store, why };
    }
    let is_denied = says(NO_RIGHT) || says(NO_RIGHT_STATUS) || io.is_some_and(is_denied);
    match error {
        OsError::PermissionDenied { .. } | OsError::Unauthenticated { .. } => {
            StoreError::Denied { doing, store, why }
        }
        _ if is_denied => StoreError::Denied { doing, store, why },
        // Of a write; of a read it is an object that is not there.
        OsError::NotFound { .. } => StoreError::NoSuchStore { store, why },
        OsError::NotImplemented { .. } | OsError::NotSupported { .. } => {
            StoreError::Unsupported { store, why: format!("{doing} failed: {why}") }
        }
        _ if refused.is_some() => StoreError::Unsupported { store, why: format!("{doing} failed: {why}") },
        _ => StoreError::Unavailable { doing, store, why },
    }
}

/// Whether an object is missing, in a bucket that is there.
pub(super) fn is_no_object(error: &OsError) -> bool {
    matches!(error, OsError::NotFound { .. }) && !is_no_store(error)
}

/// Whether it is the bucket that is missing.
pub(super) fn is_no_store(error: &OsError) -> bool {
    let said = whole_text(error);
    NO_STORE.iter().any(|code| said.contains(code))
}

/// Whether a client refuses to speak without encryption.
pub(super) fn is_plain_http(said: &str) -> bool {
    said.contains("URL scheme is not allowed")
}

fn is_full(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn is_denied(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// The I/O error within an error, if there is one.
fn io_kind(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    find::<io::Error>(error).map(io::Error::kind)
}

/// The first error of this type among an error and its causes.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    causes(error).find_map(|e| e.downcast_ref())
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |e: &&'a (dyn Error + 'static)| (*e).source())
}

/// The error's own words and those of its causes down to the deepest, which is what a person can act on.
pub(super) fn whole_text(error: &(dyn Error + 'static)) -> String {
    causes(error).skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}
