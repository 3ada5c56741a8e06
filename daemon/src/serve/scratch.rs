//! The directory of one VM: its sockets, and notes to the next daemon of what was under way.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::{fs::DirBuilderExt as _, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use dormouse_vmm_glue::firecracker::VmmProcess;

use crate::failure::Failure;

/// How long a Firecracker that an earlier daemon was just starting may take to answer.
const START_PATIENCE: Duration = Duration::from_millis(300);
/// Between two looks for it.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A directory closed to other users.
#[derive(Clone, Debug)]
pub(super) struct Scratch(PathBuf);

/// What is noted there, as an empty file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    /// The guest was let go on: whoever asked for it has been told, or will be.
    Woken,
}

impl Mark {
    fn file(self) -> &'static str {
        match self {
            Mark::Woken => "woken",
        }
    }
}

impl Scratch {
    /// A new one in `directory`. Its path is short, as a socket's must be.
    pub(super) fn make(directory: &Path, short_name: &str) -> Result<Self, Failure> {
        let path = directory.join(short_name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
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

    /// Notes it.
    pub(super) fn mark(&self, mark: Mark) {
        if let Err(error) = File::create(self.0.join(mark.file())) {
            tracing::warn!(%error, ?mark, "the next daemon will not know");
        }
    }

    pub(super) fn has(&self, mark: Mark) -> bool {
        self.0.join(mark.file()).exists()
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
            Some(_) if scratch.has(Mark::Woken) => {}
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
            if self.has(Mark::Woken) || begun.elapsed() > START_PATIENCE {
                return None;
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }
}
