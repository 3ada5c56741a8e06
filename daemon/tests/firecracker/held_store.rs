//! A local store, offered over S3 and written to: answers may be held back, so that a process can be killed in between.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::scene::wait_until;

/// What happens to the next write of a reference by an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// It is done and answered.
    Nothing,
    /// It is not done, and never answered.
    BeforeItIsDone,
    /// It is on its way until [`HeldStore::land`], and never answered.
    UntilItIsLate,
    /// It is done: the snapshot is durable. It is never answered.
    BeforeItIsAnswered,
    /// It is done and its connection is closed; the store is away from then on.
    ThenAway,
    /// The same, and it is not done.
    AwayBeforeItIsDone,
}

pub(crate) struct HeldStore {
    pub(crate) address: String,
    shared: Arc<Shared>,
}

struct Shared {
    directory: PathBuf,
    read_delay: Duration,
    hold: Mutex<Hold>,
    /// A write that is on its way.
    late: Mutex<Option<(PathBuf, Request)>>,
    held: AtomicUsize,
    away: AtomicBool,
    /// The reference whose next reading waits, and for what.
    read: Mutex<Option<(String, Receiver<()>)>>,
}

impl HeldStore {
    /// Serves the store in `directory`, each read after a delay.
    pub(crate) fn start(directory: PathBuf, read_delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (hold, held) = (Mutex::new(Hold::Nothing), AtomicUsize::new(0));
        let (away, read) = (AtomicBool::new(false), Mutex::new(None));
        let late = Mutex::new(None);
        let shared = Arc::new(Shared { directory, read_delay, hold, late, held, away, read });
        let serving = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                std::thread::spawn(move || while serving.answer(&stream).is_some() {});
            }
        });
        HeldStore { address, shared }
    }

    pub(crate) fn hold(&self, hold: Hold) {
        *self.shared.hold.lock().unwrap() = hold;
    }

    /// The next reading of the reference `name` waits until what this gives is dropped.
    pub(crate) fn hold_reading(&self, name: &str) -> Sender<()> {
        let (release, released) = channel();
        *self.shared.read.lock().unwrap() = Some((format!("refs/{name}"), released));
        release
    }

    /// The write that was on its way arrives: its answer.
    pub(crate) fn land(&self) -> &'static str {
        let _one = self.shared.one_at_a_time();
        let (file, request) = self.shared.late.lock().unwrap().take().unwrap();
        put(&file, &request)
    }

    /// It answers again.
    pub(crate) fn come_back(&self) {
        self.shared.away.store(false, Ordering::SeqCst);
    }

    /// Waits until an answer has been held back, and holds none from then on.
    pub(crate) fn wait_held(&self) {
        wait_until("an answer that is held back", || self.shared.held.load(Ordering::SeqCst) > 0);
        self.shared.held.store(0, Ordering::SeqCst);
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

fn request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        Some(line.trim().to_owned())
    };
    let first = line()?;
    let mut headers = HashMap::new();
    while let Some((name, value)) = line()?.split_once(':') {
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers.get("content-length").map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body).ok()?;
    let mut words = first.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Some(Request { method, path: decoded(path), query: decoded(query), headers, body })
}

/// Percent-decoding, as far as keys need it.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push(char::from(u8::from_str_radix(&part[..2], 16).unwrap()));
        out.push_str(&part[2..]);
    }
    out
}

fn etag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("\"{:016x}\"", hasher.finish())
}

impl Shared {
    fn one_at_a_time(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap()
    }

    fn answer(&self, stream: &TcpStream) -> Option<()> {
        let request = request(stream)?;
        if self.away.load(Ordering::SeqCst) {
            return None;
        }
        let key = request.path.strip_prefix("/bucket/store/").unwrap_or_default();
        let file = self.directory.join(key);
        let (status, extra, body) = match request.method.as_str() {
            "PUT" => {
                let mut hold = self.one_at_a_time();
                // Imports write references in version 1. Others only say the same again, or that a guest is newer.
                let of_reference = key.contains("refs/") && request.body.get(8..10) == Some(&[1, 0]);
                let held =
                    if of_reference { std::mem::replace(&mut *hold, Hold::Nothing) } else { Hold::Nothing };
                let not_yet = [Hold::BeforeItIsDone, Hold::UntilItIsLate, Hold::AwayBeforeItIsDone];
                let done = !not_yet.contains(&held);
                let status = if done { put(&file, &request) } else { "" };
                // Others go on.
                drop(hold);
                match held {
                    Hold::Nothing => {}
                    Hold::BeforeItIsDone | Hold::BeforeItIsAnswered => return self.never(),
                    Hold::UntilItIsLate => {
                        *self.late.lock().unwrap() = Some((file, request));
                        return self.never();
                    }
                    Hold::ThenAway | Hold::AwayBeforeItIsDone => {
                        self.away.store(true, Ordering::SeqCst);
                        return None;
                    }
                }
                (status, format!("ETag: {}\r\n", etag(&request.body)), Vec::new())
            }
            "DELETE" => {
                let _ = std::fs::remove_file(file);
                ("204 No Content", String::new(), Vec::new())
            }
            _ if request.query.contains("list-type") => ("200 OK", String::new(), self.list(&request.query)),
            _ => {
                std::thread::sleep(self.read_delay);
                self.wait_to_read(key);
                read(&file, &request)
            }
        };
        let length = format!("Content-Length: {}\r\n", body.len());
        let length =
            if request.method == "HEAD" || status.starts_with("204") { String::new() } else { length };
        let mut stream = stream;
        stream.write_all(format!("HTTP/1.1 {status}\r\n{extra}{length}\r\n").as_bytes()).ok()?;
        if request.method != "HEAD" {
            stream.write_all(&body).ok()?;
        }
        Some(())
    }

    fn wait_to_read(&self, key: &str) {
        let mut read = self.read.lock().unwrap();
        let Some((_, released)) = read.take_if(|(name, _)| key.ends_with(name.as_str())) else { return };
        drop(read);
        self.held.fetch_add(1, Ordering::SeqCst);
        let _ = released.recv();
    }

    /// The connection stays open, and nothing is said.
    fn never(&self) -> Option<()> {
        self.held.fetch_add(1, Ordering::SeqCst);
        loop {
            std::thread::park();
        }
    }

    fn list(&self, query: &str) -> Vec<u8> {
        let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix=")).unwrap_or_default();
        let prefix = prefix.strip_prefix("store/").unwrap_or(prefix);
        let mut keys = Vec::new();
        walk(&self.directory, &self.directory, &mut keys);
        let mut out =
            String::from(r#"<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>"#);
        for (key, bytes) in keys.iter().filter(|(key, _)| key.starts_with(prefix)) {
            out += &format!(
                "<Contents><Key>store/{key}</Key><Size>{bytes}</Size><ETag>\"1\"</ETag>\
                 <LastModified>2026-11-24T00:00:00.000Z</LastModified></Contents>"
            );
        }
        (out + "</ListBucketResult>").into_bytes()
    }
}

fn walk(root: &Path, directory: &Path, keys: &mut Vec<(String, u64)>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(root, &path, keys);
        } else if let Ok(meta) = entry.metadata() {
            keys.push((path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), meta.len()));
        }
    }
}

fn put(file: &Path, request: &Request) -> &'static str {
    let there = std::fs::read(file).ok();
    let must_be_absent = request.headers.contains_key("if-none-match");
    let must_be = request.headers.get("if-match");
    let stale = must_be.is_some_and(|tag| there.as_deref().map(etag).as_ref() != Some(tag));
    if (must_be_absent && there.is_some()) || stale {
        return "412 Precondition Failed";
    }
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, &request.body).unwrap();
    "200 OK"
}

fn read(file: &Path, request: &Request) -> (&'static str, String, Vec<u8>) {
    let Ok(object) = std::fs::read(file) else { return ("404 Not Found", String::new(), Vec::new()) };
    let fixed = format!("ETag: {}\r\nLast-Modified: Tue, 24 Nov 2026 00:00:00 GMT\r\n", etag(&object));
    let range = request.headers.get("range").and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let total = object.len();
    match range {
        _ if request.method == "HEAD" => {
            ("200 OK", format!("{fixed}Content-Length: {total}\r\n"), Vec::new())
        }
        None => ("200 OK", fixed, object),
        Some((first, last)) => {
            let (first, end) = match first.parse::<usize>() {
                Ok(first) => (first, last.parse().map_or(total, |last: usize| total.min(last + 1))),
                // The last so many.
                Err(_) => (total.saturating_sub(last.parse().unwrap()), total),
            };
            let extra = format!("{fixed}Content-Range: bytes {first}-{}/{total}\r\n", end.saturating_sub(1));
            ("206 Partial Content", extra, object[first..end].to_vec())
        }
    }
}
