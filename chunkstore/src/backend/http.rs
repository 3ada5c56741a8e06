//! The clients of clouds, with mistakes of their classification mended.

use async_trait::async_trait;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
        ReqwestConnector,
    },
};

use super::classify::{is_plain_http, whole_text};

/// What a server answers that will not answer otherwise: it does not know such requests, or has no room.
const FINAL: [u16; 3] = [501, 505, 507];

/// An answer that is the same to every attempt, though its number is that of a failure of the server, which
/// `object_store` would try again.
#[derive(Debug, thiserror::Error)]
#[error("the server answered {status}")]
pub(super) struct Refused {
    pub(super) status: u16,
}

/// Connects as `object_store` does, and lets it ask again where a connection ended in a way it has no name for.
///
/// A server that hangs up between the handshake and the request makes an error of the kind
/// [`HttpErrorKind::Unknown`], which is given up at once, while the same hang-up a moment later is retried.
/// Whether such a request arrived is not known, which is what [`HttpErrorKind::Interrupted`] says: what may be
/// asked twice is, the rest is left to the caller.
#[derive(Debug)]
pub(super) struct RetryingConnector;

impl HttpConnector for RetryingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(NamedErrors(client)))
    }
}

#[derive(Debug)]
pub(super) struct NamedErrors(pub(super) HttpClient);

#[async_trait]
impl HttpService for NamedErrors {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.0.execute(request).await.map_err(|error| match error.kind() {
            // Nothing was sent, nor will it be.
            HttpErrorKind::Unknown | HttpErrorKind::Request if is_plain_http(&whole_text(&error)) => {
                HttpError::new(HttpErrorKind::Decode, error)
            }
            HttpErrorKind::Unknown => HttpError::new(HttpErrorKind::Interrupted, error),
            _ => error,
        })?;
        let status = answer.status().as_u16();
        // Of this kind, and only of this one, no error is tried again.
        if FINAL.contains(&status) {
            return Err(HttpError::new(HttpErrorKind::Decode, Refused { status }));
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use object_store::{ObjectStoreExt, aws::AmazonS3Builder, client::HttpResponseBody};

    use super::*;

    /// Ends its first requests with an error of this kind, and answers those after it.
    #[derive(Clone, Debug)]
    struct Ends {
        kind: HttpErrorKind,
        left: Arc<AtomicU64>,
    }

    #[async_trait]
    impl HttpService for Ends {
        async fn call(&self, _: HttpRequest) -> Result<HttpResponse, HttpError> {
            if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                return Err(HttpError::new(self.kind, std::io::Error::other("hung up")));
            }
            let mut answer = HttpResponse::new(HttpResponseBody::from(bytes::Bytes::new()));
            let headers = answer.headers_mut();
            for (name, value) in [
                ("content-length", "0"),
                ("etag", "\"1\""),
                ("last-modified", "Thu, 26 Nov 2026 01:00:00 GMT"),
            ] {
                headers.insert(name, value.parse().unwrap());
            }
            Ok(answer)
        }
    }

    impl HttpConnector for Ends {
        fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
            Ok(HttpClient::new(NamedErrors(HttpClient::new(self.clone()))))
        }
    }

    /// Whether an object is found through a client whose first two requests end with an error of this kind.
    fn is_found_after_two_errors(kind: HttpErrorKind) -> bool {
        let store = AmazonS3Builder::new()
            .with_bucket_name("b")
            .with_access_key_id("k")
            .with_secret_access_key("s")
            .with_http_connector(Ends { kind, left: Arc::new(AtomicU64::new(2)) })
            .build()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(store.head(&"packs/1".into())).is_ok()
    }

    #[test]
    fn a_hang_up_that_has_no_name_is_tried_again() {
        assert!(is_found_after_two_errors(HttpErrorKind::Unknown));
    }

    #[test]
    fn an_error_that_has_a_name_is_left_as_it_is() {
        assert!(is_found_after_two_errors(HttpErrorKind::Request));
        assert!(!is_found_after_two_errors(HttpErrorKind::Decode));
    }
}
