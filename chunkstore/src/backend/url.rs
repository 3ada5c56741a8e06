//! From a store's URL to its backend.

use std::{path::Path, sync::Arc, time::Duration};

use object_store::{
    ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, memory::InMemory,
};
use url::Url;

use super::{
    Backend, aws_profile::ProfileCredentials, http::RetryingConnector, local::LocalBackend,
    object::ObjectBackend, runner::Runner,
};
use crate::error::{Result, StoreError};

/// The URLs that are understood, for messages.
const FORMS: &str =
    "file:///path, /path, memory://, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix";

/// Opens the store at `url`. Credentials and endpoints of clouds come from their usual environment variables
/// (`AWS_*`, `GOOGLE_*`, `AZURE_*`); those of S3, where the environment has none, from the profile that AWS's tools use.
///
/// # Errors
/// [`StoreError::Usage`] for a URL that is not one of the forms; what the backend says otherwise.
pub fn open_url(url: &str) -> Result<Arc<dyn Backend>> {
    let usage = |why: String| StoreError::Usage(format!("{url:?} is no store: {why}; use one of {FORMS}"));
    if !url.contains("://") {
        if url.is_empty() {
            return Err(usage("it is empty".into()));
        }
        let path = Path::new(url);
        let absolute = std::path::absolute(path).map_err(|e| usage(e.to_string()))?;
        return Ok(Arc::new(LocalBackend::open(path, format!("file://{}", absolute.display()))?));
    }
    let parsed = Url::parse(url).map_err(|e| usage(e.to_string()))?;
    let retry = RetryConfig { max_retries: 4, retry_timeout: Duration::from_secs(60), ..Default::default() };
    let client = ClientOptions::new()
        .with_timeout(Duration::from_secs(60))
        .with_connect_timeout(Duration::from_secs(5));
    let not_usable = |e: object_store::Error| usage(e.to_string());
    let store: Arc<dyn ObjectStore> = match parsed.scheme() {
        "file" => {
            let path = parsed.to_file_path().map_err(|()| usage("its path is not absolute".into()))?;
            return Ok(Arc::new(LocalBackend::open(&path, url.to_owned())?));
        }
        "memory" => Arc::new(InMemory::new()),
        "s3" => {
            let mut builder = AmazonS3Builder::from_env()
                .with_url(url)
                .with_http_connector(RetryingConnector)
                .with_retry(retry)
                .with_client_options(client_from(client, "AWS_ALLOW_HTTP"));
            if let Some(profile) = ProfileCredentials::from_env() {
                builder = builder.with_credentials(Arc::new(profile));
            }
            Arc::new(builder.build().map_err(not_usable)?)
        }
        "gs" => Arc::new(
            GoogleCloudStorageBuilder::from_env()
                .with_url(url)
                .with_http_connector(RetryingConnector)
                .with_retry(retry)
                .with_client_options(client)
                .build()
                .map_err(not_usable)?,
        ),
        "az" => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_url(url)
                .with_http_connector(RetryingConnector)
                .with_retry(retry)
                .with_client_options(client_from(client, "AZURE_ALLOW_HTTP"))
                .build()
                .map_err(not_usable)?,
        ),
        other => return Err(usage(format!("{other:?} is an unknown scheme"))),
    };
    let keeps_conditions = parsed.scheme() == "memory";
    let runner = if keeps_conditions {
        Runner::INLINE
    } else {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("dormouse-store")
            .enable_all()
            .build()
            .map_err(|e| StoreError::Usage(format!("no threads for the store's client: {e}")))?;
        Runner::on(runtime)
    };
    let prefix =
        object_store::path::Path::parse(parsed.path().trim_matches('/')).map_err(|e| usage(e.to_string()))?;
    let (url, worked) = (url.to_owned(), false.into());
    Ok(Arc::new(ObjectBackend { url, prefix, store, runner, keeps_conditions, worked }))
}

/// Plain HTTP only where the environment says so, as for tests against a server of one's own.
fn client_from(client: ClientOptions, variable: &str) -> ClientOptions {
    let allow = std::env::var(variable).is_ok_and(|v| v.eq_ignore_ascii_case("true") || v == "1");
    client.with_allow_http(allow)
}
