//! What this host remembers of a running VM: which snapshot its dirty pages are counted from, and what it touched first.
//!
//! Another process than the one that resumed a VM puts it on standby, so both are in files, one per VMM process.
//!
//! Firecracker counts dirty pages from its last snapshot or load and cannot say which that was. A difference
//! imported over another parent would be a machine that never was, so this host remembers, per VMM process. What
//! is not remembered is captured in full.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use dormouse_vmm_common::vmm_process::VmmProcess;
use dormouse_wake::Record;

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
        serde_json::from_slice(&fs::read(self.path(process, "json")?).ok()?).ok()
    }

    /// Remembers that the dirty pages of `process` are counted from `base`.
    ///
    /// # Errors
    /// Nothing is remembered then.
    pub fn remember(&self, process: &VmmProcess, base: &Base) -> io::Result<()> {
        let path = self.path(process, "json").ok_or_else(|| io::Error::other("the process has ended"))?;
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
        match self.path(process, "json").map(fs::remove_file) {
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Remembers what the VM of `process` touched first, in place of what was remembered of it before.
    ///
    /// # Errors
    /// What was remembered before still is.
    pub fn note_session(&self, process: &VmmProcess, record: &Record) -> io::Result<()> {
        let path = self.path(process, "session").ok_or_else(|| io::Error::other("the process has ended"))?;
        record.write(&path)
    }

    /// What the VM of `process` touched first, as far as it is known. Anything unreadable counts as nothing.
    pub fn session_of(&self, process: &VmmProcess) -> Option<Record> {
        Record::read(&self.path(process, "session")?).ok()
    }

    /// Forgets what the VM of `process` touched.
    pub fn forget_session(&self, process: &VmmProcess) {
        // There may be nothing, and what is left over costs a few bytes until the next start of the host.
        let _ = self.path(process, "session").map(fs::remove_file);
    }

    /// Says that this process holds a snapshot's first pages decoded in memory, for as long as the mark is held.
    ///
    /// # Errors
    /// The operating system's.
    pub fn mark_hot(&self, snapshot: &str) -> io::Result<HotMark> {
        let path = self.directory.join(format!("hot-{snapshot}-{}", std::process::id()));
        let file = File::create(&path)?;
        file.try_lock().map_err(io::Error::from)?;
        Ok(HotMark { _locked: file, path })
    }

    /// Whether a process of this host and user holds the snapshot's first pages decoded in memory.
    pub fn is_hot(&self, snapshot: &str) -> bool {
        let prefix = format!("hot-{snapshot}-");
        let files = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let marks = files.filter(|f| f.file_name().to_string_lossy().starts_with(&prefix));
        marks.map(|f| f.path()).any(|path| {
            let Ok(file) = File::open(&path) else { return false };
            if file.try_lock_shared().is_err() {
                return true;
            }
            // Whoever made it is gone.
            let _ = fs::remove_file(path);
            false
        })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where [`Tracking::note_session`] writes for `process`: it can be removed once that has ended.
    pub(super) fn session_path(&self, process: &VmmProcess) -> Option<PathBuf> {
        self.path(process, "session")
    }

    /// A process's file: numbers are used again, so its start and this boot belong to its name.
    pub(super) fn path(&self, process: &VmmProcess, kind: &str) -> Option<PathBuf> {
        Some(self.directory.join(format!("{}.{kind}", stem_of(process.peer().pid)?)))
    }

    /// Deletes what is remembered of processes that have ended: nobody finds it again. What is noted of a standby is for
    /// those who finish it.
    pub fn sweep(&self) {
        for file in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = file.file_name();
            let Some((stem, kind)) = name.to_str().and_then(|name| name.rsplit_once('.')) else { continue };
            let pid = stem.strip_prefix("firecracker-").and_then(|rest| rest.split('-').next()?.parse().ok());
            if let (Some(pid), "json" | "session" | "new") = (pid, kind)
                && stem_of(pid).as_deref() != Some(stem)
                && let Err(error) = fs::remove_file(file.path())
            {
                tracing::debug!(%error, path = %file.path().display(), "what an ended VM left stays behind");
            }
        }
    }
}

/// What the files of the process with this number are called; `None` if there is none.
fn stem_of(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field may hold anything, parentheses included; the start is the 22nd, 20th after it.
    let start: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(format!("firecracker-{pid}-{start}-{}", boot.trim()))
}

/// A snapshot is hot in this process until this is dropped, or the process ends.
#[derive(Debug)]
pub struct HotMark {
    _locked: File,
    path: PathBuf,
}

impl Drop for HotMark {
    fn drop(&mut self) {
        // Left behind, it is not locked any more.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_processes_left_is_swept_and_nothing_else() {
        let directory = tempfile::tempdir().expect("directory");
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).expect("mode");
        let tracking = Tracking::open(directory.path()).expect("open");
        let alive = stem_of(std::process::id() as i32).expect("this process");
        let (number, boot) = (std::process::id(), alive.rsplit_once('-').expect("a boot's id").0);
        let stays = [
            format!("{alive}.json"),
            format!("{alive}.session"),
            format!("{alive}.new"),
            format!("firecracker-{number}-1-x.standby"),
            "control.sock".to_owned(),
            "other-7-1-x.json".to_owned(),
            "firecracker.json".to_owned(),
        ];
        let goes = [
            // Its number is another's now, or was in another life of the host, or is nobody's.
            format!("firecracker-{number}-1-x.json"),
            format!("{boot}-another-boot.session"),
            format!("firecracker-{}-1-x.session", i32::MAX),
            format!("firecracker-{}-1-x.new", i32::MAX),
        ];
        stays
            .iter()
            .chain(&goes)
            .for_each(|name| fs::write(directory.path().join(name), b"").expect("write"));
        tracking.sweep();
        assert!(stays.iter().all(|name| directory.path().join(name).exists()));
        assert!(goes.iter().all(|name| !directory.path().join(name).exists()));
    }

    #[test]
    fn a_snapshot_is_hot_for_as_long_as_somebody_holds_it() {
        let directory = tempfile::tempdir().expect("directory");
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).expect("mode");
        let tracking = Tracking::open(directory.path()).expect("open");
        let mark = tracking.mark_hot("ab").expect("mark");
        assert!(tracking.is_hot("ab") && !tracking.is_hot("a") && !tracking.is_hot("abc"));
        drop(mark);
        assert!(!tracking.is_hot("ab"));
        // What a process that was killed leaves behind.
        let left = directory.path().join("hot-cd-1");
        std::fs::write(&left, b"").expect("write");
        assert!(!tracking.is_hot("cd") && !left.exists());
    }
}
