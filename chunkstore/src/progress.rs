//! How far a long operation is.

/// Told of progress by import, export, verify and repack; called from several threads.
pub trait Progress: Send + Sync {
    /// The whole job is this many bytes (known before the first [`Progress::advance`]).
    fn begin(&self, _total_bytes: u64) {}
    /// This many more bytes of the job are done.
    fn advance(&self, _bytes: u64) {}
    /// All of a snapshot is stored, and its name is about to be moved: from here on it may be durable at any time.
    fn naming(&self) {}
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}
