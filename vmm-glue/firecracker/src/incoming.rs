//! Handshakes as they come: each on a thread of its own, so that no peer can hold up another.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::handshake::{Handshake, HandshakeError, receive_handshake};
use dormouse_vmm_common::listener::HandshakeListener;

/// Handshakes under way at the same time. Further peers wait in the socket's queue.
const UNDER_WAY_MAX: usize = 16;
/// Between two looks whether to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Takes connections for as long as it lives. Dropping it removes the socket.
#[derive(Debug)]
pub struct Incoming {
    handshakes: Mutex<Receiver<Result<Handshake, HandshakeError>>>,
    stopping: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Incoming {
    /// Takes the connections of `listener`. Each peer has `patience` to complete its handshake.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(listener: HandshakeListener, patience: Duration) -> std::io::Result<Self> {
        let (sender, handshakes) = channel();
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let acceptor = Builder::new()
            .name("dm-accept".into())
            .spawn(move || accept_all(&listener, patience, &sender, &stop))?;
        Ok(Self { handshakes: Mutex::new(handshakes), stopping, acceptor: Some(acceptor) })
    }

    /// The next handshake, or why one failed: that peer is gone then, and others are not disturbed.
    /// `None` if there is neither within `timeout`.
    pub fn next(&self, timeout: Duration) -> Option<Result<Handshake, HandshakeError>> {
        let handshakes = self.handshakes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match handshakes.recv_timeout(timeout) {
            Ok(handshake) => Some(handshake),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(std::io::Error::other("the socket is no longer listened on").into()))
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(acceptor) = self.acceptor.take() {
            // A thread that panicked has said so on its own.
            let _ = acceptor.join();
        }
    }
}

fn accept_all(
    listener: &HandshakeListener,
    patience: Duration,
    sender: &Sender<Result<Handshake, HandshakeError>>,
    stopping: &AtomicBool,
) {
    let under_way = Arc::new(AtomicUsize::new(0));
    while !stopping.load(Ordering::Acquire) {
        if under_way.load(Ordering::Acquire) >= UNDER_WAY_MAX {
            std::thread::sleep(LOOK_INTERVAL);
            continue;
        }
        let connection = match listener.accept(Instant::now() + LOOK_INTERVAL) {
            Ok(Some(connection)) => connection,
            Ok(None) => continue,
            Err(error) => {
                // Out of descriptors, most likely: it may pass.
                if sender.send(Err(error.into())).is_err() {
                    return;
                }
                std::thread::sleep(LOOK_INTERVAL);
                continue;
            }
        };
        let (allowed, sender_of_one) = (listener.peer_uid(), sender.clone());
        let slot = Slot::take(&under_way);
        let started = Builder::new().name("dm-handshake".into()).spawn(move || {
            let _slot = slot;
            // If nobody listens any more, the handshake is dropped and its connection closed.
            let _ = sender_of_one.send(receive_handshake(connection, allowed, Instant::now() + patience));
        });
        if let Err(error) = started
            && sender.send(Err(error.into())).is_err()
        {
            return;
        }
    }
}

/// One handshake under way.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Slot(count.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
