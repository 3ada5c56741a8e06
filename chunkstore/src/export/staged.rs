//! A file that is not in its place before it is whole.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata, Permissions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};

/// What files are called that are not whole yet, where they must have a name; followed by a process and a number.
const PREFIX: &str = ".dormouse-export-";

/// A file that is not in its place yet. Killed, it leaves nothing behind, where the file system can make files without a
/// name; elsewhere its name is locked while it is written, and the next export into the directory removes it.
#[derive(Debug)]
pub(super) struct Staged {
    file: File,
    dir: File,
    name: OsString,
    /// Its name until then.
    temporary: Option<OsString>,
    /// Mode and owner of what it will replace.
    replaces: Option<(u32, u32, u32)>,
}

impl Staged {
    /// One that will be at `path`, where there may be something of a kind already.
    pub(super) fn beside(path: &Path, replaces: Option<&Metadata>) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?.to_owned();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = File::from(rustix::fs::open(parent(path), flags, Mode::empty())?);
        sweep(parent(path), &dir);
        // What only its owner was to read is not shown before it is in its place, either.
        let mode = Mode::from_raw_mode(if replaces.is_some() { 0o600 } else { 0o666 });
        // A lock, and nobody else takes it for one that was left behind.
        let lock = |file: &File| rustix::fs::flock(file, FlockOperation::LockExclusive);
        let (file, temporary) = loop {
            if let Some(file) = nameless(&dir, mode)? {
                lock(&file)?;
                break (file, None);
            }
            let (file, name) = named(|name| {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&dir, name, flags, mode)
            })?;
            let file = File::from(file);
            lock(&file)?;
            // Somebody may have taken it for that before it was locked.
            if file.metadata()?.nlink() > 0 {
                break (file, Some(name));
            }
        };
        let replaces = replaces.map(|meta| (meta.mode() & 0o777, meta.uid(), meta.gid()));
        Ok(Staged { file, dir, name, temporary, replaces })
    }

    /// What is written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The directory it will be in, and its name there.
    pub(super) fn entry(&self) -> io::Result<((u64, u64), OsString)> {
        let dir = rustix::fs::fstat(&self.dir)?;
        Ok(((dir.st_dev, dir.st_ino), self.name.clone()))
    }

    /// Makes it durable and puts it in its place.
    pub(super) fn publish(mut self) -> io::Result<()> {
        if let Some((mode, uid, gid)) = self.replaces {
            let now = self.file.metadata()?;
            if (now.uid(), now.gid()) != (uid, gid) {
                // Who may not give it away keeps it.
                let _ = std::os::unix::fs::fchown(&self.file, Some(uid), Some(gid));
            }
            self.file.set_permissions(Permissions::from_mode(mode))?;
        }
        self.file.sync_all()?;
        if self.temporary.is_none() {
            let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let link =
                |name: &OsStr| rustix::fs::linkat(CWD, &open, &self.dir, name, AtFlags::SYMLINK_FOLLOW);
            let linked = match self.replaces {
                None => link(&self.name),
                Some(_) => Err(rustix::io::Errno::EXIST),
            };
            match linked {
                Ok(()) => return self.sync_dir(),
                Err(rustix::io::Errno::EXIST) => self.temporary = Some(named(link)?.1),
                Err(e) => return Err(e.into()),
            }
        }
        if let Some(temporary) = &self.temporary {
            rustix::fs::renameat(&self.dir, temporary, &self.dir, &self.name)?;
        }
        self.temporary = None;
        self.sync_dir()
    }

    fn sync_dir(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, ".", flags, Mode::empty()) {
            Ok(dir) => Ok(rustix::fs::fsync(dir)?),
            // One may write into directories that one may not list; then its file system decides.
            Err(_) => Ok(()),
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = rustix::fs::unlinkat(&self.dir, temporary, AtFlags::empty());
        }
    }
}

/// A file without a name, if the file system can make one and it can be given a name later.
fn nameless(dir: &File, mode: Mode) -> io::Result<Option<File>> {
    use rustix::io::Errno;
    if fs::symlink_metadata("/proc/self/fd").is_err() {
        return Ok(None);
    }
    match rustix::fs::openat(dir, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS | Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Makes something under the first name that is free.
fn named<T>(make: impl Fn(&OsStr) -> rustix::io::Result<T>) -> io::Result<(T, OsString)> {
    for n in 0u32.. {
        let name = OsString::from(format!("{PREFIX}{}-{n}", std::process::id()));
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Removes what exports that were killed have left behind: whoever still writes to such a file has it locked.
fn sweep(path: &Path, dir: &File) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(dir, &name, flags, Mode::empty()) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = rustix::fs::unlinkat(dir, &name, AtFlags::empty());
        }
    }
}

/// The directory that a path is in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_a_name_takes_its_place_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let files = || fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        let named = || {
            let mut staged = Staged::beside(&dir.path().join("x"), None).unwrap();
            // As where a file system makes no file without a name.
            let name = dir.path().join(".dormouse-export-1-0");
            staged.file = File::create_new(&name).unwrap();
            rustix::fs::flock(&staged.file, FlockOperation::LockExclusive).unwrap();
            staged.temporary = name.file_name().map(OsStr::to_owned);
            staged
        };
        drop(named());
        assert!(files().is_empty());
        let staged = named();
        drop(Staged::beside(&dir.path().join("y"), None).unwrap());
        assert_eq!(files(), [".dormouse-export-1-0"], "one that is written to is not swept");
        staged.publish().unwrap();
        assert_eq!(files(), ["x"]);
    }
}
