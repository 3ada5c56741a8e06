//! One client.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::{
    handshake::{Agreed, Export, Handshake, Next, greeting},
    protocol::{
        Command, OPTION_BYTES_MAX, OPTION_HEADER_BYTES, REQUEST_BYTES_MAX, REQUEST_HEADER_BYTES, Request,
        option_header, option_reply, reply,
    },
    requests::carry_out,
};
use crate::Disk;

const WORKERS: usize = 4;
/// Bytes that requests of one client may hold together; one alone may be larger.
const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;
const IN_FLIGHT_REQUESTS_MAX: usize = 64;
const OPTIONS_MAX: usize = 256;
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);

/// Requests that were read and not answered.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Request, Vec<u8>)>,
    requests: usize,
    bytes: u64,
    /// No request follows.
    closed: bool,
}

/// Serves a client until it leaves, breaks the protocol, or the socket is shut down.
pub(super) fn serve(disk: &Disk, export: Export, stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(HANDSHAKE_PATIENCE))?;
    stream.set_write_timeout(Some(HANDSHAKE_PATIENCE))?;
    let Some(agreed) = shake_hands(export, stream)? else { return Ok(()) };
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let (queue, answers) = (Queue::default(), Mutex::new(stream));
    thread::scope(|scope| {
        for number in 0..WORKERS {
            let work = || queue.work(disk, agreed, &answers);
            let started = thread::Builder::new().name(format!("nbd-{number}")).spawn_scoped(scope, work);
            if let Err(error) = started {
                queue.close();
                return Err(error);
            }
        }
        let read = read_requests(stream, &queue);
        queue.close();
        read
    })
}

fn shake_hands(export: Export, mut stream: &UnixStream) -> io::Result<Option<Agreed>> {
    stream.write_all(&greeting())?;
    let Some(mut handshake) = Handshake::begin(export, read_array(stream)?) else { return Ok(None) };
    for _ in 0..OPTIONS_MAX {
        let header = read_array::<OPTION_HEADER_BYTES>(stream)?;
        let Some((option, length)) = option_header(&header) else { return Ok(None) };
        let next = if length > OPTION_BYTES_MAX {
            // What follows is read and thrown away, if it is not more than a request may be.
            if length > REQUEST_BYTES_MAX {
                return Ok(None);
            }
            io::copy(&mut stream.take(length.into()), &mut io::sink())?;
            Next::Option(option_reply(option, reply::ERR_TOO_BIG, b"too long"))
        } else {
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data)?;
            handshake.option(option, &data)
        };
        match next {
            Next::Option(answer) => stream.write_all(&answer)?,
            Next::Requests(answer) => {
                stream.write_all(&answer)?;
                return Ok(Some(handshake.agreed()));
            }
            Next::Close(answer) => {
                stream.write_all(&answer)?;
                return Ok(None);
            }
        }
    }
    Ok(None)
}

fn read_array<const N: usize>(mut stream: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_requests(mut stream: &UnixStream, queue: &Queue) -> io::Result<()> {
    loop {
        let header = match read_array::<REQUEST_HEADER_BYTES>(stream) {
            Ok(header) => header,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(request) = Request::decode(&header) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no request"));
        };
        if request.command == Command::Disconnect {
            return Ok(());
        }
        if request.payload_bytes() > REQUEST_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is larger than was offered"));
        }
        // A read that is too large is refused and holds nothing.
        let bytes = Some(request.buffer_bytes()).filter(|bytes| *bytes <= REQUEST_BYTES_MAX).unwrap_or(0);
        if !queue.admit(bytes.into()) {
            return Ok(());
        }
        let mut payload = vec![0; request.payload_bytes() as usize];
        stream.read_exact(&mut payload)?;
        queue.push(request, payload);
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for a request. `false` once the connection is over.
    fn admit(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        while !state.closed
            && state.requests > 0
            && (state.requests == IN_FLIGHT_REQUESTS_MAX || state.bytes + bytes > IN_FLIGHT_BYTES_MAX)
        {
            state = self.wait(state);
        }
        state.requests += 1;
        state.bytes += bytes;
        !state.closed
    }

    fn push(&self, request: Request, payload: Vec<u8>) {
        self.lock().waiting.push_back((request, payload));
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Carries out requests until there are no more: those that were read are done even if the client is gone.
    fn work(&self, disk: &Disk, agreed: Agreed, answers: &Mutex<&UnixStream>) {
        loop {
            let mut state = self.lock();
            let (request, payload) = loop {
                if let Some(job) = state.waiting.pop_front() {
                    break job;
                }
                if state.closed {
                    return;
                }
                state = self.wait(state);
            };
            drop(state);
            let answer = carry_out(disk, agreed, &request, payload);
            let sent = {
                let mut stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
                answer.iter().try_for_each(|part| stream.write_all(part))
            };
            let mut state = self.lock();
            state.requests -= 1;
            state.bytes -= u64::from(request.buffer_bytes());
            drop(state);
            self.changed.notify_all();
            if sent.is_err() {
                // Half an answer may be out: nobody can make sense of another one. This ends the reader too.
                let stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = stream.shutdown(std::net::Shutdown::Both);
                self.close();
            }
        }
    }
}

/// A client, shared by the thread that serves it and the server that may end it.
pub(super) type Client = Arc<UnixStream>;
