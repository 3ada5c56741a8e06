//! The directory of one VM: its sockets, and a note to the next daemon that it is being woken.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::{fs::DirBuilderExt as _, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use dormouse_firecracker::VmmProcess;

use crate::failure::Failure;

/// How long a Firecracker that an earlier daemon was just starting may take to answer.
const START_PATIENCE: Duration = Duration::from_millis(300);
/// Between two looks for it.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A directory closed to other users.
#[derive(Clone, Debug)]
pub(super) struct Scratch(PathBuf);

/// An empty file that is there until the guest was let go on: nobody has been told of it before. Its absence says that
/// the VM lives a life of its own, so that a directory which was lost costs no VM.
const WAKING: &str = "waking";

impl Scratch {
    /// A new one in `directory`, of a VM that is being woken. Its path is short, as a socket's must be.
    pub(super) fn make(directory: &Path, short_name: &str) -> Result<Self, Failure> {
        let path = directory.join(short_name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        let made = made.and_then(|()| File::create(path.join(WAKING)));
        made.map_err(|e| Failure::file("making", &path, &e))?;
        Ok(Scratch(path))
    }

    /// The one at `path`, as an earlier daemon noted it.
    pub(super) fn at(path: &str) -> Self {
        Scratch(path.into())
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Notes that the guest was let go on: whoever asked for it has been told, or will be.
    pub(super) fn woken(&self) {
        if let Err(error) = fs::remove_file(self.0.join(WAKING)) {
            tracing::error!(%error, path = %self.0.display(), "the next daemon will take this VM for one that never woke");
        }
    }

    /// Whether the guest was not let go on yet.
    pub(super) fn is_waking(&self) -> bool {
        self.0.join(WAKING).exists()
    }

    /// Removes it with all there is in it.
    pub(super) fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the VM's directory stays behind");
        }
    }
}

/// Removes what VMs left in `directory` that ended while no daemon was there, and ends what an earlier daemon was about
/// to wake: nobody was told of it, and nobody serves its memory. `kept` are taken care of elsewhere.
pub(super) fn clean(directory: &Path, kept: &[PathBuf]) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| !kept.contains(path)) {
        let scratch = Scratch(path);
        match scratch.firecracker() {
            // It was detached: it needs nobody.
            Some(_) if !scratch.is_waking() => {}
            Some(process) => {
                let killed = process.kill();
                let pid = process.peer().pid;
                tracing::warn!(pid, ?killed, "a Firecracker that was being woken was left behind");
                scratch.remove();
            }
            None => scratch.remove(),
        }
    }
}

impl Scratch {
    /// The Firecracker that was started for it, if it lives. One that is just starting has a moment to answer.
    fn firecracker(&self) -> Option<VmmProcess> {
        let begun = Instant::now();
        loop {
            if let Ok(connection) = UnixStream::connect(self.0.join("api.sock")) {
                return VmmProcess::of(&connection).ok();
            }
            if !self.is_waking() || begun.elapsed() > START_PATIENCE {
                return None;
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }
}
