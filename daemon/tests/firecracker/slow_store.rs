//! A guest does not stand still for a store.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::scene::{Running, scene, wait_until};

/// An S3 store that has nothing, and never answers a write. Gives its address and whether it was written to.
fn store_that_takes_for_ever() -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let written = Arc::new(AtomicBool::new(false));
    let flag = written.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let flag = flag.clone();
            std::thread::spawn(move || answer(&stream.unwrap(), &flag));
        }
    });
    (address, written)
}

fn answer(stream: &TcpStream, written: &AtomicBool) {
    const NOTHING: &str = r#"<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"#;
    let mut lines = BufReader::new(stream).lines();
    while let Some(Ok(request)) = lines.next() {
        while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
        let (status, body) = match request.split(' ').next() {
            Some("GET") if request.contains("list-type") => ("200 OK", NOTHING),
            Some("GET" | "HEAD") => ("404 Not Found", ""),
            _ => {
                written.store(true, Ordering::SeqCst);
                return std::thread::park();
            }
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut stream = stream;
        if stream.write_all(format!("{head}{body}").as_bytes()).is_err() {
            return;
        }
    }
}

#[test]
fn the_guest_goes_on_before_the_store_has_taken_anything() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    let (address, written) = store_that_takes_for_ever();
    let socket = scene.text("boot.sock");
    let arguments = ["standby", "firecracker", "--api-socket", &socket, "vm", "--keep-running"];
    let mut command = scene.dormouse("home", &arguments);
    let settings = [
        ("AWS_ENDPOINT", address.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ];
    command.envs(settings).args(["--store", "s3://bucket/prefix"]);
    let mut standby = Running::start(command);
    wait_until("the snapshot to be on its way", || {
        if let Some(status) = standby.child().try_wait().unwrap() {
            panic!("{status}: {}", standby.stderr());
        }
        written.load(Ordering::SeqCst)
    });
    machine.console.goes_on(2);
    assert!(standby.child().try_wait().unwrap().is_none(), "it is not durable, so it is not acknowledged");
    standby.kill();
    machine.console.assert_no_wrong_page();
}
