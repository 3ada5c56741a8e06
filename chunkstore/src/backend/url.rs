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
    if is_directory(url).map_err(usage)? {
        let path = Path::new(url);
        let absolute = std::path::absolute(path).map_err(|e| usage(e.to_string()))?;
        return Ok(Arc::new(LocalBackend::open(path, format!("file://{}", absolute.display()))?));
    }
    let parsed = Url::parse(url).map_err(|e| usage(e.to_string()))?;
    refuse_what_is_dropped(&parsed).map_err(usage)?;
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
    let prefix = prefix_of(&parsed).map_err(|e| usage(e.to_string()))?;
    let (url, worked) = (url.to_owned(), false.into());
    Ok(Arc::new(ObjectBackend { url, prefix, store, runner, keeps_conditions, worked }))
}

/// Whether this is a path rather than a URL; an error for what may be a slip of either. A directory that is called so is
/// still had by `./` before its name.
fn is_directory(url: &str) -> Result<bool, String> {
    if url.is_empty() {
        return Err("it is empty".into());
    }
    if url.starts_with('~') {
        return Err(format!(
            "the shell replaces ~ only where it is not quoted; write $HOME, or ./{url} for a directory of that name"
        ));
    }
    match scheme_of(url) {
        None => Ok(true),
        Some(scheme) if url[scheme.len()..].starts_with("://") => Ok(false),
        Some(scheme) => Err(format!("write {scheme}:// for a URL, or ./{url} for a directory of that name")),
    }
}

/// The word before the first colon, if it could be a scheme.
fn scheme_of(url: &str) -> Option<&str> {
    let (word, _) = url.split_once(':')?;
    let is_scheme = word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    is_scheme.then_some(word)
}

/// Parts of a URL that would mean nothing here are refused: whoever wrote them meant something.
fn refuse_what_is_dropped(url: &Url) -> Result<(), String> {
    let part = if url.query().is_some() {
        "a query (write %3F for a ? in a name)"
    } else if url.fragment().is_some() {
        "a fragment (write %23 for a # in a name)"
    } else if !url.username().is_empty() || url.password().is_some() {
        "a user (credentials come from the environment)"
    } else if url.port().is_some() {
        "a port (endpoints come from the environment, such as AWS_ENDPOINT)"
    } else {
        let needs_bucket = !matches!(url.scheme(), "file" | "memory");
        let has_bucket = url.host_str().is_some_and(|host| !host.is_empty());
        return if needs_bucket && !has_bucket { Err("the bucket is missing".into()) } else { Ok(()) };
    };
    Err(format!("it has {part}, which stores do not have"))
}

/// What the names of all objects begin with: the URL's path, decoded.
fn prefix_of(url: &Url) -> Result<object_store::path::Path, object_store::path::Error> {
    object_store::path::Path::from_url_path(url.path().trim_matches('/'))
}

/// Plain HTTP only where the environment says so, as for tests against a server of one's own.
fn client_from(client: ClientOptions, variable: &str) -> ClientOptions {
    let allow = std::env::var(variable).is_ok_and(|v| v.eq_ignore_ascii_case("true") || v == "1");
    client.with_allow_http(allow)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::TryStreamExt as _;

    use super::*;

    #[test]
    fn a_slip_in_a_url_makes_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let home = std::env::current_dir().unwrap();
        for slip in [
            "",
            "s3:bucket",
            "s3:/b/x",
            "file:rel",
            "file:/abs",
            "word:",
            "~",
            "~/x",
            "~user/x",
            "gs:b",
            "s3://",
            "s3:///x",
            "s3://b/x?a=b",
            "s3://b/x#y",
            "s3://key:secret@b/x",
            "s3://b:9000/x",
            "file:///tmp/x?y",
            "file:///tmp/x#y",
            "file://rel/x",
            "ftp://somewhere",
            "memory://?x",
        ] {
            let refused = open_url(slip).unwrap_err();
            assert!(matches!(refused, StoreError::Usage(_)), "{slip}: {refused:?}");
            assert!(slip.is_empty() || !home.join(slip).exists(), "{slip} was made");
        }
        for path in ["s3:bucket", "~", "word:", "a b", "a://b"] {
            assert!(is_directory(&format!("./{path}")).is_ok(), "{path}");
            open_url(dir.path().join(path).to_str().unwrap()).unwrap();
        }
    }

    #[test]
    fn names_of_objects_begin_with_the_path_as_it_is_read() {
        let store = Arc::new(InMemory::new());
        let backend = |url: &str| ObjectBackend {
            url: url.to_owned(),
            prefix: prefix_of(&Url::parse(url).unwrap()).unwrap(),
            store: store.clone(),
            runner: Runner::INLINE,
            keeps_conditions: true,
            worked: false.into(),
        };
        let (spaced, encoded) = (backend("s3://b/a b/ü"), backend("s3://b/a%20b/%C3%BC/"));
        spaced.put_new("plain/refs/x", Bytes::from_static(b"1")).unwrap();
        assert_eq!(encoded.get("plain/refs/x", None).unwrap().as_deref(), Some(&b"1"[..]));
        let mut listed = Vec::new();
        encoded.list("plain/", &mut |meta| listed.push(meta.key)).unwrap();
        assert_eq!(listed, ["plain/refs/x"]);
        // What was stored before the path was decoded can still be had, by encoding it once more.
        backend("s3://b/a%252520b").put_new("y", Bytes::from_static(b"2")).unwrap();
        let all = futures::executor::block_on(store.list(None).try_collect::<Vec<_>>()).unwrap();
        let names: Vec<_> = all.iter().map(|meta| meta.location.to_string()).collect();
        assert_eq!(names, ["a b/ü/plain/refs/x", "a%2520b/y"]);
    }
}
