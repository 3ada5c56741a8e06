//! The socket.

use std::{
    collections::HashMap,
    fs, io,
    net::Shutdown,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{
    connection::{Client, serve},
    handshake::Export,
};
use crate::Disk;

const CLIENTS_MAX: usize = 16;

/// Serves one disk until it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    disk: Arc<Disk>,
    export: Export,
    clients: Mutex<Clients>,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Clients {
    next: u64,
    streams: HashMap<u64, Client>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens at `path`, for its owner alone, and serves `disk` there under `name`. A socket that nobody listens at any more
    /// is replaced.
    pub fn start(disk: Arc<Disk>, name: &str, path: &Path) -> io::Result<Self> {
        let listener = listen(path)?;
        let export =
            Export { name: name.to_owned(), size_bytes: disk.size_bytes(), read_only: disk.is_read_only() };
        let (clients, stopping) = Default::default();
        let shared = Arc::new(Shared { disk, export, clients, stopping });
        let acceptor = {
            let shared = shared.clone();
            thread::Builder::new().name("nbd-accept".into()).spawn(move || shared.accept(&listener))?
        };
        Ok(Server { shared, path: path.to_owned(), acceptor: Some(acceptor) })
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.shared.lock().streams.len()
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() || UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match stream {
                Ok(stream) => self.welcome(Arc::new(stream)),
                Err(error) => {
                    // Of file descriptors, for example, which others may give back.
                    tracing::warn!(%error, "a client of an NBD export could not be accepted");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, client: Client) {
        let mut clients = self.lock();
        clients.threads.retain(|thread| !thread.is_finished());
        if clients.streams.len() >= CLIENTS_MAX {
            tracing::warn!(
                CLIENTS_MAX,
                "an NBD export has all the clients that it takes; one was turned away"
            );
            return;
        }
        let number = clients.next;
        clients.next += 1;
        clients.streams.insert(number, client.clone());
        let shared = self.clone();
        let serving = thread::Builder::new().name("nbd-client".into()).spawn(move || {
            if let Err(error) = serve(&shared.disk, shared.export.clone(), &client) {
                tracing::debug!(%error, "an NBD connection broke off");
            }
            let _ = client.shutdown(Shutdown::Both);
            shared.lock().streams.remove(&number);
        });
        match serving {
            Ok(thread) => clients.threads.push(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread for a client of an NBD export");
                clients.streams.remove(&number);
            }
        }
    }
}

impl Drop for Server {
    /// Closes the connections. Requests that were read are carried out, within the disk's patience; their answers may be lost.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Wakes the acceptor. Whoever removed the socket's file has to wait for another client to come: it is not joined then.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(acceptor) = self.acceptor.take().filter(|_| woken) {
            let _ = acceptor.join();
        }
        let threads = {
            let mut clients = self.shared.lock();
            for stream in clients.streams.values() {
                let _ = stream.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut clients.threads)
        };
        for thread in threads {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}
