//! Answers: JSON documents, and failures as `{"error": {code, message, hint, ...}}`.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::codes;
use crate::failure::Failure;

/// What a handler gives.
pub(super) type Answer = Result<Response, Failure>;

/// The body of every answer that is no success.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ErrorBody {
    pub(crate) error: ErrorDocument,
}

/// A failure, for programs (`code`) and people.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ErrorDocument {
    /// One of [`codes::CODES`].
    pub(crate) code: String,
    /// What happened.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: String,
    /// Whether the same request may succeed later without anybody mending anything.
    pub(crate) retryable: bool,
    /// The object in the store that is missing or damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<String>,
}

impl From<ErrorBody> for Failure {
    fn from(ErrorBody { error }: ErrorBody) -> Self {
        Failure {
            kind: codes::known(&error.code),
            message: error.message,
            object: error.object,
            retryable: error.retryable,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, hint) = codes::lookup(self.kind);
        let document = ErrorDocument {
            code: self.kind.into(),
            message: self.message,
            hint: hint.into(),
            retryable: self.retryable,
            object: self.object,
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        json(status, &ErrorBody { error: document }).unwrap_or_else(|_| status.into_response())
    }
}

/// A document.
pub(super) fn json<T: Serialize>(status: StatusCode, document: &T) -> Answer {
    let mut bytes = serde_json::to_vec(document).map_err(|e| Failure::new("bug", e.to_string()))?;
    // For those who ask with curl.
    bytes.push(b'\n');
    Ok((status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response())
}

/// A document, 200.
pub(super) fn ok<T: Serialize>(document: &T) -> Answer {
    json(StatusCode::OK, document)
}
