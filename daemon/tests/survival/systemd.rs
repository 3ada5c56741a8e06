//! A service of systemd, with a stand-in for systemd: what it is told by sd_notify(3), and what it hands over at the
//! next start by sd_listen_fds(3).

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

pub(crate) struct Manager {
    socket: PathBuf,
    store: Store,
}

impl Manager {
    pub(crate) fn start(socket: PathBuf) -> Self {
        let listener = UnixDatagram::bind(&socket).unwrap();
        let store = Store::default();
        let kept = store.clone();
        std::thread::spawn(move || {
            loop {
                listen(&listener, &kept);
            }
        });
        Manager { socket, store }
    }

    /// How many descriptors are in store.
    pub(crate) fn stored(&self) -> usize {
        self.store.lock().unwrap().len()
    }

    /// Has `service` started as systemd does: with what is in store as descriptors 3 and on.
    pub(crate) fn command(&self, service: &Command) -> Command {
        const FIRST: i32 = 200;
        let (mut script, mut names, mut number) = (String::new(), Vec::new(), 3);
        for (name, fd) in self.store.lock().unwrap().iter().rev() {
            let fd = rustix::io::fcntl_dupfd_cloexec(fd, FIRST).unwrap();
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
            script += &format!("exec {number}<&{0} {0}<&-\n", fd.as_raw_fd());
            // It goes with this process: the shell may not have it before.
            std::mem::forget(fd);
            names.push(name.clone());
            number += 1;
        }
        script += "export LISTEN_PID=$$\nexec \"$@\"\n";
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]).arg(service.get_program()).args(service.get_args());
        for (name, value) in service.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("NOTIFY_SOCKET", &self.socket).env("FDSTORE", "64");
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        command
    }
}

fn listen(listener: &UnixDatagram, store: &Store) {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let got = rustix::net::recvmsg(listener, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            descriptors.extend(fds);
        }
    }
    let message = String::from_utf8_lossy(&buffer[..got.bytes]).into_owned();
    let value = |key: &str| message.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
    let mut store = store.lock().unwrap();
    match value("FDNAME") {
        Some(name) if value("FDSTORE") == Some("1") => {
            store.extend(descriptors.into_iter().map(|fd| (name.to_owned(), fd)));
        }
        Some(name) if value("FDSTOREREMOVE") == Some("1") => store.retain(|(n, _)| n != name),
        // A barrier is passed by closing what came with it.
        _ => drop(descriptors),
    }
}
