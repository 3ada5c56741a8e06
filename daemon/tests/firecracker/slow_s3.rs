//! A local store, offered as a slow one: read-only S3, as far as a resume needs it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Makes `command` use the store at `address`.
pub(crate) fn use_store(command: &mut Command, address: &str) {
    let settings = [
        ("AWS_ENDPOINT", address),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("DORMOUSE_STORE", "s3://bucket/store"),
    ];
    command.envs(settings);
}

/// Serves the store in `directory`, each answer after `delay`; its address.
pub(crate) fn start(directory: PathBuf, delay: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let directory = directory.clone();
            std::thread::spawn(move || answer_all(&stream, &directory, delay));
        }
    });
    address
}

fn answer_all(stream: &TcpStream, directory: &Path, delay: Duration) {
    let mut lines = BufReader::new(stream).lines();
    while let Some(Ok(request)) = lines.next() {
        let headers = lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty());
        let range = headers.filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let (first, last) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
            name.eq_ignore_ascii_case("range").then_some((first.parse::<usize>().ok()?, last.parse().ok()))
        });
        let range = range.last();
        std::thread::sleep(delay);
        let key = request.split(' ').nth(1).and_then(|path| path.strip_prefix("/bucket/store/"));
        let object = key.and_then(|key| std::fs::read(directory.join(key)).ok());
        let (head, body) = match (&object, range) {
            (None, _) => ("404 Not Found".into(), &[][..]),
            (Some(object), None) => ("200 OK".into(), &object[..]),
            (Some(object), Some((first, last))) => {
                let end = last.map_or(object.len(), |last: usize| object.len().min(last + 1));
                let range = format!("bytes {first}-{}/{}", end - 1, object.len());
                (format!("206 Partial Content\r\nContent-Range: {range}"), &object[first..end])
            }
        };
        let fixed = "ETag: \"1\"\r\nLast-Modified: Tue, 24 Nov 2026 00:00:00 GMT";
        let head = format!("HTTP/1.1 {head}\r\n{fixed}\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut stream = stream;
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).is_err() {
            return;
        }
    }
}
