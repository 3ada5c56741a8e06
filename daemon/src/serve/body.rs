//! What a request names and carries: bodies are bounded in bytes and time.

use std::time::Duration;

use axum::{
    body::{self, Body, HttpBody as _},
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::request::Parts,
};
use serde::de::DeserializeOwned;

use crate::failure::Failure;

/// Most bytes of a body. The longest request has a few paths in it.
const BODY_BYTES_MAX: usize = 64 << 10;
/// How long a body may take to come.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// A JSON body. None at all stands for `{}`.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let bytes = tokio::time::timeout(BODY_PATIENCE, read(request.into_body()));
        let bytes = bytes.await.map_err(|_| {
            Failure::new("too_slow", format!("the body did not come within {BODY_PATIENCE:?}"))
        })??;
        let text = if bytes.is_empty() { b"{}".as_slice() } else { &bytes };
        match serde_json::from_slice(text) {
            Ok(value) => Ok(Json(value)),
            Err(why) => {
                Err(Failure::new("bad_request", format!("the body is not what is asked for here: {why}")))
            }
        }
    }
}

/// A segment of the path: the name of something.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Named(name)),
            Err(why) => {
                Err(Failure::new("bad_request", format!("the path names nothing: {}", why.body_text())))
            }
        }
    }
}

async fn read(body: Body) -> Result<body::Bytes, Failure> {
    let too_large = || Failure::new("too_large", format!("the body is over {BODY_BYTES_MAX} bytes"));
    // As announced: there is no need to wait for it.
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    body::to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| {
        let source = std::error::Error::source(&error);
        if source.is_some_and(|s| s.is::<http_body_util::LengthLimitError>()) {
            too_large()
        } else {
            Failure::new("bad_request", format!("the body was cut short: {error}"))
        }
    })
}
