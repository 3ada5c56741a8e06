//! The file of the dedup index: who has it open, and what becomes of it when it cannot be opened.
//!
//! The database lets one opener in. All who work side by side in one process share that one, so that each finds what the
//! others learned. Only a file that is damaged is replaced: what else keeps it from being opened (too many open files,
//! no permission, a full disk, a disk that is not mounted) passes, and what was learned is then there again.

use std::{
    collections::{HashMap, HashSet},
    io::ErrorKind,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{Database, DatabaseError, StorageError};

/// Bytes the database may keep in memory.
const DATABASE_CACHE_BYTES: usize = 24 << 20;

static OPEN: LazyLock<Mutex<Open>> = LazyLock::new(Mutex::default);

/// What this process has open. Opening and closing is done under its lock: nobody meets a file that is half closed.
#[derive(Default)]
struct Open {
    databases: HashMap<PathBuf, Arc<OnDisk>>,
    /// Files of which was told that they cannot be used, until they can.
    told: HashSet<PathBuf>,
}

fn open() -> MutexGuard<'static, Open> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A share in an open database. The last one closes it.
#[derive(Debug)]
pub(super) struct Handle(Option<Arc<OnDisk>>);

impl Handle {
    /// The database in `dir`. `None`, and told once, if it is not usable now.
    pub(super) fn open(dir: &Path) -> Option<Self> {
        let made = std::fs::create_dir_all(dir).and_then(|()| dir.canonicalize());
        let mut open = open();
        let path = made.as_deref().unwrap_or(dir).join("index.redb");
        if let Some(shared) = open.databases.get(&path).filter(|shared| shared.is_of_use()) {
            return Some(Handle(Some(shared.clone())));
        }
        let opened = match made {
            Ok(_) => OnDisk::open(path.clone()),
            Err(why) => Err(format!("making {}: {why}", dir.display())),
        };
        match opened {
            Ok(database) => {
                let database = Arc::new(database);
                open.told.remove(&path);
                open.databases.insert(path, database.clone());
                Some(Handle(Some(database)))
            }
            Err(why) => {
                if open.told.insert(path.clone()) {
                    let path = path.display();
                    tracing::warn!(%path, %why, "the dedup index on disk is not usable now, one in memory is used");
                }
                None
            }
        }
    }

    /// Asks the database. Once it panicked, which it does where its file is damaged, it is asked no more, and the next to
    /// open it begins with an empty one.
    pub(super) fn ask<T>(&self, ask: impl FnOnce(&Database) -> Option<T>) -> Option<T> {
        let shared = self.0.as_ref().filter(|shared| shared.is_of_use())?;
        let database = shared.database.as_ref()?;
        catch_unwind(AssertUnwindSafe(|| ask(database))).unwrap_or_else(|_| {
            shared.discard();
            None
        })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut open = open();
        // Closed, if it is the last, before the lock is given back.
        let Some(mine) = self.0.take() else { return };
        let is_listed = open.databases.get(&mine.path).is_some_and(|listed| Arc::ptr_eq(listed, &mine));
        // Shares are taken and given back under the lock, so the count stands: the list's own, and this one.
        if is_listed && Arc::strong_count(&mine) == 2 {
            open.databases.remove(&mine.path);
        }
        drop(mine);
    }
}

/// The database, as long as it is of use.
#[derive(Debug)]
struct OnDisk {
    database: Option<Database>,
    path: PathBuf,
    damaged: AtomicBool,
}

impl OnDisk {
    fn open(path: PathBuf) -> Result<Self, String> {
        let create = || Database::builder().set_cache_size(DATABASE_CACHE_BYTES).create(&path);
        // Of a damaged file the database may say so in any way, also by panicking.
        let damage = match catch_unwind(AssertUnwindSafe(create)) {
            Ok(Ok(database)) => return Ok(OnDisk::new(database, path)),
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => return Err("another process has it open".into()),
            Ok(Err(why)) if !is_damage(&why) => return Err(why.to_string()),
            Ok(Err(why)) => why.to_string(),
            Err(_) => "it is damaged".into(),
        };
        // It is only a cache, so a new one is as good.
        tracing::warn!(path = %path.display(), why = %damage, "the dedup index on disk is made anew");
        std::fs::remove_file(&path).map_err(|e| format!("{damage}; removing it: {e}"))?;
        let database = create().map_err(|e| format!("{damage}; making it anew: {e}"))?;
        Ok(OnDisk::new(database, path))
    }

    fn new(database: Database, path: PathBuf) -> Self {
        OnDisk { database: Some(database), path, damaged: false.into() }
    }

    fn is_of_use(&self) -> bool {
        !self.damaged.load(Ordering::SeqCst)
    }

    /// Deletes the damaged file, once: a second time it might be the new one of somebody else.
    fn discard(&self) {
        if self.is_of_use() {
            let removed = std::fs::remove_file(&self.path);
            self.damaged.store(true, Ordering::SeqCst);
            tracing::warn!(path = %self.path.display(), ?removed, "the dedup index on disk was damaged");
        }
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        let database = self.database.take();
        // What it still has to write may meet the damage as well.
        if catch_unwind(AssertUnwindSafe(|| drop(database))).is_err() {
            self.discard();
        }
    }
}

/// Whether the bytes of the file are to blame, which no waiting mends. Of another version counts as well.
fn is_damage(why: &DatabaseError) -> bool {
    match why {
        DatabaseError::Storage(StorageError::Corrupted(_)) | DatabaseError::UpgradeRequired(_) => true,
        // So the database says itself that a file is too short, or none of its own; no system call says so.
        DatabaseError::Storage(StorageError::Io(why)) => {
            matches!(why.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io, os::unix::fs::symlink};

    use redb::{ReadableDatabase as _, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("test");

    fn learn(handle: &Handle) {
        let learned = handle.ask(|database| {
            let write = database.begin_write().ok()?;
            write.open_table(TABLE).ok()?.insert(1, 2).ok()?;
            write.commit().ok()
        });
        assert!(learned.is_some());
    }

    fn knows(handle: &Handle) -> bool {
        let known = handle.ask(|database| {
            database.begin_read().ok()?.open_table(TABLE).ok()?.get(1).ok()?.map(|value| value.value())
        });
        known == Some(2)
    }

    #[test]
    fn an_index_that_cannot_be_opened_now_is_left_alone() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        learn(&Handle::open(dir.path()).unwrap());
        let path = dir.path().join("index.redb");
        // On a disk that is not mounted for a while.
        let (mounted, away) = (disk.path().join("mounted"), disk.path().join("away"));
        fs::create_dir(&away).unwrap();
        fs::rename(&path, away.join("index.redb")).unwrap();
        symlink(mounted.join("index.redb"), &path).unwrap();
        for _ in 0..2 {
            assert!(Handle::open(dir.path()).is_none(), "one in memory is used");
            assert!(path.is_symlink(), "and what stands there is not touched");
        }
        fs::rename(&away, &mounted).unwrap();
        assert!(knows(&Handle::open(dir.path()).unwrap()), "what was learned is there again");
    }

    #[test]
    fn a_folder_in_place_of_the_index_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        fs::create_dir(&path).unwrap();
        assert!(Handle::open(dir.path()).is_none());
        assert!(path.is_dir());
    }

    #[test]
    fn only_what_the_bytes_are_to_blame_for_is_damage() {
        // EPERM, EIO, EACCES, ENFILE, EMFILE, ENOSPC, EROFS, EDQUOT
        for passing in [1, 5, 13, 23, 24, 28, 30, 122] {
            let why = DatabaseError::from(io::Error::from_raw_os_error(passing));
            assert!(!is_damage(&why), "{why}");
        }
        assert!(!is_damage(&DatabaseError::LockProtocolMismatch));
        assert!(is_damage(&DatabaseError::Storage(StorageError::Corrupted("a page".into()))));
        assert!(is_damage(&DatabaseError::UpgradeRequired(2)));
    }

    #[test]
    fn those_of_one_process_share_what_one_learned() {
        let dir = tempfile::tempdir().unwrap();
        let first = Handle::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        let second = Handle::open(&dir.path().join("x/..")).expect("by another spelling of its path as well");
        learn(&first);
        assert!(knows(&second));
        drop(first);
        let third = Handle::open(dir.path()).unwrap();
        drop(second);
        assert!(knows(&third));
        drop(third);
        let path = dir.path().canonicalize().unwrap().join("index.redb");
        assert!(!open().databases.contains_key(&path), "the last one closed it");
        assert!(knows(&Handle::open(dir.path()).unwrap()));
    }

    #[test]
    fn a_file_that_is_no_index_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        for bytes in [vec![0x5a; 100], vec![0x5a; 1 << 20]] {
            fs::write(&path, bytes).unwrap();
            let handle = Handle::open(dir.path()).unwrap();
            learn(&handle);
            assert!(knows(&handle));
        }
    }

    #[test]
    fn one_that_was_found_damaged_is_not_shared_with_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let first = Handle::open(dir.path()).unwrap();
        assert!(
            first
                .ask(|_| -> Option<()> { panic!("as the database does where its file is damaged") })
                .is_none()
        );
        let second = Handle::open(dir.path()).unwrap();
        learn(&second);
        drop(first);
        drop(second);
        assert!(
            knows(&Handle::open(dir.path()).unwrap()),
            "the first one, when closed, leaves the new file alone"
        );
    }
}
