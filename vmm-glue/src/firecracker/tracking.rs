//! Which snapshot a running VM's dirty pages are counted from.
//!
//! Firecracker counts dirty pages from its last snapshot or load and cannot say which that was. A difference
//! imported over another parent would be a machine that never was, so this host remembers, per VMM process. What
//! is not remembered is captured in full.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::vmm_process::VmmProcess;

/// A snapshot from which a VM's dirty pages are counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its name, when it was remembered.
    pub name: String,
    /// Its identity.
    pub snapshot: String,
}

/// This host's memory of it.
#[derive(Clone, Debug)]
pub struct Tracking {
    directory: PathBuf,
}

impl Tracking {
    /// Remembers in `directory`, which is made and must be closed to other users: who can write there decides
    /// what becomes of a VM's memory.
    ///
    /// # Errors
    /// It cannot be made, or is somebody else's.
    pub fn open(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let meta = fs::symlink_metadata(directory)?;
        let ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
        if !ours || meta.mode() & 0o022 != 0 {
            let why = format!("{} must be a directory that only this user can write", directory.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// What is known of `process`. Anything unreadable counts as nothing.
    pub fn base_of(&self, process: &VmmProcess) -> Option<Base> {
        serde_json::from_slice(&fs::read(self.path(process)?).ok()?).ok()
    }

    /// Remembers that the dirty pages of `process` are counted from `base`.
    ///
    /// # Errors
    /// Nothing is remembered then.
    pub fn remember(&self, process: &VmmProcess, base: &Base) -> io::Result<()> {
        let path = self.path(process).ok_or_else(|| io::Error::other("the process has ended"))?;
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(base)?)?;
        fs::set_permissions(&unfinished, Permissions::from_mode(0o600))?;
        fs::rename(unfinished, path)
    }

    /// Forgets `process`. To be done *before* a snapshot is taken.
    ///
    /// # Errors
    /// It may still be remembered: take no difference.
    pub fn forget(&self, process: &VmmProcess) -> io::Result<()> {
        match self.path(process).map(fs::remove_file) {
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A process's file: numbers are used again, so its start and this boot belong to its name.
    fn path(&self, process: &VmmProcess) -> Option<PathBuf> {
        let pid = process.peer().pid;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field may hold anything, parentheses included; the start is the 22nd, 20th after it.
        let start: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(self.directory.join(format!("firecracker-{pid}-{start}-{}.json", boot.trim())))
    }
}
