//! A server behind a connection that breaks once, at the worst moment.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// What becomes of the first write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Breaks {
    /// It never arrives, as on a connection that the server closed because it lay idle.
    BeforeIt,
    /// It is done, and its answer is lost.
    AfterIt,
}

/// An address that leads to the server at `upstream`, and whether it has broken.
pub fn breaking(upstream: &str, breaks: Breaks) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, upstream) = (listener.local_addr().unwrap().to_string(), upstream.to_owned());
    let broken = Arc::new(AtomicBool::new(false));
    let at_work = broken.clone();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, upstream, broken) = (client.unwrap(), upstream.clone(), at_work.clone());
            thread::spawn(move || serve(client, &upstream, breaks, &broken));
        }
    });
    (address, broken)
}

/// Ends a connection as a server does that knows nothing of it any more.
fn reset(client: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
}

fn serve(mut client: TcpStream, upstream: &str, breaks: Breaks, broken: &AtomicBool) {
    let mut begin = [0; 4];
    if client.read_exact(&mut begin).is_err() {
        return;
    }
    let break_it = begin == *b"PUT " && !broken.swap(true, Ordering::SeqCst);
    if break_it && breaks == Breaks::BeforeIt {
        return reset(client);
    }
    let mut server = TcpStream::connect(upstream).unwrap();
    server.write_all(&begin).unwrap();
    if break_it {
        // All of it is one small segment. The answer begins: it is done.
        let mut rest = [0; 16384];
        let sent = client.read(&mut rest).unwrap();
        server.write_all(&rest[..sent]).unwrap();
        let _ = server.read(&mut begin);
        return reset(client);
    }
    let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(Shutdown::Both);
}
