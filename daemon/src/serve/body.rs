//! Request bodies: bounded in bytes and time.

use std::time::Duration;

use axum::{
    body::{self, Body},
    extract::{FromRequest, Request},
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

async fn read(body: Body) -> Result<body::Bytes, Failure> {
    body::to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| {
        let source = std::error::Error::source(&error);
        if source.is_some_and(|s| s.is::<http_body_util::LengthLimitError>()) {
            Failure::new("too_large", format!("the body is over {BODY_BYTES_MAX} bytes"))
        } else {
            Failure::new("bad_request", format!("the body was cut short: {error}"))
        }
    })
}
