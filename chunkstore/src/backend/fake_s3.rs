//! A server of the S3 protocol within the client, for tests: it misbehaves as it is told to.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use object_store::{
    BackoffConfig, ClientOptions, RetryConfig,
    aws::AmazonS3Builder,
    client::{
        HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    },
};

use super::{http::NamedErrors, object::ObjectBackend, runner::Runner};

/// What the server does wrong; nothing by default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Conditions of creation are ignored.
    pub(crate) ignores_create: bool,
    /// Conditions of replacement are ignored.
    pub(crate) ignores_replace: bool,
    /// The first conditional write of each object whose key has this in it is a conflict, and is not done.
    pub(crate) conflicts_once: Option<&'static str>,
    /// So is every one of these.
    pub(crate) conflicts_always: Option<&'static str>,
    /// The first write of each of these is done, and the answer is a failure.
    pub(crate) loses_answer: Option<&'static str>,
    /// Listings do not show objects whose key ends in this.
    pub(crate) hides: Option<&'static str>,
    /// Reads of objects whose key has this in it are never answered.
    pub(crate) silent: Option<&'static str>,
    /// Objects whose key has this in it lie in an archive tier: they are there and cannot be read.
    pub(crate) archived: Option<&'static str>,
    /// Every request is answered with this.
    pub(crate) answers: Option<(u16, &'static str)>,
}

/// What is done in between.
type Act = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// Bytes, a number that tells versions apart, and when it was written.
    objects: BTreeMap<String, (Bytes, u64, u64)>,
    faults: Faults,
    seen: HashSet<String>,
    clock_s: u64,
    versions: u64,
    asked: Vec<String>,
    unconditional: Vec<String>,
    before_delete: Option<(&'static str, Act)>,
}

/// The server.
#[derive(Clone, Default)]
pub(crate) struct FakeS3(Arc<Mutex<State>>, Arc<(Mutex<usize>, Condvar)>);

/// A request that is not answered, until its client hangs up.
struct Hanging(Arc<(Mutex<usize>, Condvar)>);

impl Drop for Hanging {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap() -= 1;
        self.0.1.notify_all();
    }
}

impl fmt::Debug for FakeS3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeS3")
    }
}

impl FakeS3 {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A client with a connection of its own.
    pub(crate) fn backend(&self) -> Arc<ObjectBackend> {
        let backoff = BackoffConfig { init_backoff: Duration::from_millis(1), ..Default::default() };
        let store = AmazonS3Builder::new()
            .with_bucket_name("bucket")
            .with_endpoint("http://fake")
            .with_access_key_id("k")
            .with_secret_access_key("s")
            .with_retry(RetryConfig { max_retries: 3, backoff, ..Default::default() })
            .with_http_connector(self.clone())
            .build()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Arc::new(ObjectBackend {
            url: "s3://bucket".into(),
            prefix: Default::default(),
            store: Arc::new(store),
            runner: Runner::on(runtime.unwrap()),
            keeps_conditions: false,
            worked: false.into(),
        })
    }

    /// Whether all clients hang up that are not answered.
    pub(crate) fn wait_until_none_is_left_hanging(&self) -> bool {
        let (hanging, ended) = &*self.1;
        let long = Duration::from_secs(30);
        !ended.wait_timeout_while(hanging.lock().unwrap(), long, |n| *n > 0).unwrap().1.timed_out()
    }

    /// From here on it misbehaves like this.
    pub(crate) fn misbehave(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.seen.clear();
    }

    /// Time passes.
    pub(crate) fn pass(&self, seconds: u64) {
        self.state().clock_s += seconds;
    }

    /// What was asked so far: methods and keys.
    pub(crate) fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state().asked)
    }

    /// Writes that were done whatever was there.
    pub(crate) fn take_unconditional(&self) -> Vec<String> {
        std::mem::take(&mut self.state().unconditional)
    }

    /// The keys of all objects.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.state().objects.keys().cloned().collect()
    }

    /// Does `act` when an object whose key has `part` in it is about to be deleted for the first time.
    pub(crate) fn before_delete(&self, part: &'static str, act: impl FnOnce() + Send + 'static) {
        self.state().before_delete = Some((part, Box::new(act)));
    }

    fn answer(&self, method: &str, url: &url::Url, headers: [Option<&str>; 3], body: &Bytes) -> HttpResponse {
        let key = url.path().trim_start_matches("/bucket").trim_start_matches('/').to_owned();
        let [if_none, if_match, range] = headers;
        let mut state = self.state();
        state.asked.push(format!("{method} {key}"));
        if let Some((status, code)) = state.faults.answers {
            return error(status, code);
        }
        match method {
            "GET" if key.is_empty() => list(&state, url),
            "POST" => {
                drop(state);
                let text = String::from_utf8_lossy(body);
                let keys: Vec<&str> =
                    text.split("<Key>").skip(1).filter_map(|k| k.split('<').next()).collect();
                keys.iter().for_each(|key| self.delete(key));
                let deleted: String =
                    keys.iter().map(|key| format!("<Deleted><Key>{key}</Key></Deleted>")).collect();
                reply(200, &format!("<DeleteResult>{deleted}</DeleteResult>"))
            }
            "DELETE" => {
                drop(state);
                self.delete(&key);
                reply(204, "")
            }
            "PUT" => put(&mut state, &key, if_none, if_match, body),
            "GET" if state.faults.archived.is_some_and(|part| key.contains(part)) => {
                error(403, "InvalidObjectState")
            }
            _ => match state.objects.get(&key) {
                None => error(404, "NoSuchKey"),
                Some((bytes, version, written)) => get(bytes, *version, *written, range, method == "HEAD"),
            },
        }
    }

    fn delete(&self, key: &str) {
        let act = {
            let mut state = self.state();
            if state.before_delete.as_ref().is_some_and(|(part, _)| key.contains(part)) {
                state.before_delete.take()
            } else {
                None
            }
        };
        if let Some((_, act)) = act {
            // Not within this client's runtime.
            std::thread::spawn(act).join().unwrap();
        }
        self.state().objects.remove(key);
    }
}

fn put(
    state: &mut State,
    key: &str,
    if_none: Option<&str>,
    if_match: Option<&str>,
    body: &Bytes,
) -> HttpResponse {
    let is = |part: Option<&str>| part.is_some_and(|part| key.contains(part));
    let is_conditional = if_none.is_some() || if_match.is_some();
    let faults = state.faults.clone();
    if is_conditional
        && (is(faults.conflicts_always) || is(faults.conflicts_once) && state.seen.insert(key.into()))
    {
        return error(409, "ConditionalRequestConflict");
    }
    let now = state.objects.get(key).map(|(_, version, _)| format!("\"{version}\""));
    let is_refused = (if_none.is_some() && now.is_some() && !faults.ignores_create)
        || (if_match.is_some() && now.as_deref() != if_match && !faults.ignores_replace);
    if is_refused {
        return error(412, "PreconditionFailed");
    }
    if !is_conditional {
        state.unconditional.push(key.to_owned());
    }
    state.versions += 1;
    let (version, clock_s) = (state.versions, state.clock_s);
    state.objects.insert(key.to_owned(), (body.clone(), version, clock_s));
    if is(faults.loses_answer) && state.seen.insert(key.to_owned()) {
        return error(400, "RequestTimeout");
    }
    let mut done = reply(200, "");
    done.headers_mut().insert("etag", format!("\"{version}\"").parse().unwrap());
    done
}

fn get(bytes: &Bytes, version: u64, written: u64, range: Option<&str>, is_head: bool) -> HttpResponse {
    let len = bytes.len() as u64;
    let range = range.and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
    let range = range
        .map(|(from, to)| (from.parse().unwrap(), to.parse::<u64>().map_or(len, |to| (to + 1).min(len))));
    if range.is_some_and(|(from, _): (u64, u64)| from >= len) {
        return error(416, "InvalidRange");
    }
    let part = range.map_or(bytes.clone(), |(from, to)| bytes.slice(from as usize..to as usize));
    let mut answer =
        HttpResponse::new(HttpResponseBody::from(if is_head { Bytes::new() } else { part.clone() }));
    *answer.status_mut() = if range.is_some() { 206u16 } else { 200 }.try_into().unwrap();
    let headers = answer.headers_mut();
    headers.insert("content-length", part.len().to_string().parse().unwrap());
    headers.insert("etag", format!("\"{version}\"").parse().unwrap());
    headers.insert("last-modified", format!("Thu, 01 Jan 2026 {} GMT", clock(written)).parse().unwrap());
    if let Some((from, to)) = range {
        headers.insert("content-range", format!("bytes {from}-{}/{len}", to - 1).parse().unwrap());
    }
    answer
}

fn list(state: &State, url: &url::Url) -> HttpResponse {
    let asked =
        |what: &str| url.query_pairs().find(|(name, _)| name == what).map(|(_, value)| value.into_owned());
    let prefix = asked("prefix").unwrap_or_default();
    if asked("delimiter").is_some() {
        return folders(state, &prefix);
    }
    let shown = state.objects.iter().filter(|(key, _)| {
        key.starts_with(&prefix) && state.faults.hides.is_none_or(|hidden| !key.ends_with(hidden))
    });
    let shown: String = shown
        .map(|(key, (bytes, version, written))| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-01T{}.000Z</LastModified><ETag>{version}</ETag>\
                 <Size>{}</Size></Contents>",
                clock(*written),
                bytes.len()
            )
        })
        .collect();
    reply(200, &format!("<ListBucketResult><Name>bucket</Name>{shown}</ListBucketResult>"))
}

/// What a listing with a delimiter gives: the next parts of keys, each once.
fn folders(state: &State, prefix: &str) -> HttpResponse {
    let below = state.objects.keys().filter_map(|key| key.strip_prefix(prefix)?.split_once('/'));
    let folders: std::collections::BTreeSet<&str> = below.map(|(folder, _)| folder).collect();
    let shown: String = folders
        .iter()
        .map(|folder| format!("<CommonPrefixes><Prefix>{prefix}{folder}/</Prefix></CommonPrefixes>"))
        .collect();
    reply(200, &format!("<ListBucketResult><Name>bucket</Name>{shown}</ListBucketResult>"))
}

/// The server's day begins at noon.
fn clock(seconds: u64) -> String {
    let all = 12 * 3600 + seconds;
    format!("{:02}:{:02}:{:02}", all / 3600, all / 60 % 60, all % 60)
}

fn error(status: u16, code: &str) -> HttpResponse {
    reply(status, &format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>"))
}

fn reply(status: u16, body: &str) -> HttpResponse {
    let mut answer = HttpResponse::new(HttpResponseBody::from(Bytes::from(body.to_owned())));
    *answer.status_mut() = status.try_into().unwrap();
    answer
}

#[async_trait]
impl HttpService for FakeS3 {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let url = url::Url::parse(&head.uri.to_string()).unwrap();
        let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap());
        let headers = [header("if-none-match"), header("if-match"), header("range")];
        let silent = self.state().faults.silent;
        if head.method.as_str() == "GET" && silent.is_some_and(|part| url.path().contains(part)) {
            *self.1.0.lock().unwrap() += 1;
            let _hanging = Hanging(self.1.clone());
            std::future::pending::<()>().await;
        }
        Ok(self.answer(head.method.as_str(), &url, headers, &body))
    }
}

impl HttpConnector for FakeS3 {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(NamedErrors(HttpClient::new(self.clone()))))
    }
}
