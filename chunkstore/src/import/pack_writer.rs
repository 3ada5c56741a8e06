//! Compressing, packing and uploading: the later stages of an import, each on threads of its own.

use std::{
    collections::BTreeMap, sync::Mutex, sync::PoisonError, sync::atomic::AtomicBool, sync::atomic::Ordering,
};

use crossbeam::channel::{Receiver, Sender};
use dormouse_core::{
    ChunkId, Domain, FrameRef, PackBuilder, PackFooter, PackRef, frame::EncodedFrame, pack::FrameKind,
};

use crate::{
    error::{Result, StoreError},
    store::Store,
};

/// The number of a new frame, counted from zero in the order in which frames are laid out.
pub(crate) type FrameSequence = u32;

/// Work for the compressing threads.
#[derive(Debug)]
pub(crate) enum RawJob {
    /// Compress these pages.
    Frame { sequence: FrameSequence, raw: Vec<u8>, chunks: Vec<ChunkId> },
    /// Close the pack before the frame of this number.
    Flush { sequence: FrameSequence },
}

#[derive(Debug)]
pub(crate) enum PackJob {
    Frame { frame: EncodedFrame, chunks: Vec<ChunkId> },
    Flush,
}

/// A closed pack, to be uploaded.
#[derive(Debug)]
pub(crate) struct ClosedPack {
    pack: PackRef,
    bytes: Vec<u8>,
    footer: PackFooter,
    frames: Vec<(FrameSequence, FrameRef)>,
}

/// A pack that is in the store.
#[derive(Debug)]
pub(crate) struct StoredPack {
    pub(crate) pack: PackRef,
    pub(crate) object_bytes: u64,
    pub(crate) footer: PackFooter,
    pub(crate) frames: Vec<(FrameSequence, FrameRef)>,
}

/// The first error of any thread; all others stop when they see it.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    failed: AtomicBool,
    first: Mutex<Option<StoreError>>,
}

impl Failure {
    pub(crate) fn set(&self, error: StoreError) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    pub(crate) fn take(&self) -> Result<()> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.take().map_or(Ok(()), Err)
    }
}

/// What the packs of one job have in common, and what makes those of a second attempt differ from the first.
///
/// The same pages make the same packs, down to their names. Where the first ones were condemned as garbage while
/// nothing referred to them yet, making them again under the same names would not help.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Packing {
    salt: Option<[u8; 16]>,
    dense: bool,
}

impl Packing {
    /// None for the first attempt; something nobody else has for later ones.
    pub(crate) fn of_attempt(attempt: usize) -> Self {
        Packing { salt: (attempt > 0).then(|| new_salt(attempt)), dense: false }
    }

    /// Packs that repacking makes, of frames as dense as they ever will be.
    ///
    /// Salted always: what an earlier repacking made and died over is garbage, and a collector that was stopped may be
    /// about to delete it. Packs of the same names would be taken for stored and then deleted.
    pub(crate) fn dense() -> Self {
        Packing { salt: Some(new_salt(0)), dense: true }
    }

    /// An empty pack, but for the salt.
    pub(crate) fn new_pack(self, domain: &Domain) -> PackBuilder {
        let mut builder = if self.dense { PackBuilder::dense(domain) } else { PackBuilder::new(domain) };
        if let Some(salt) = self.salt {
            builder.push(FrameKind::Blob, &EncodedFrame::encode(domain, &salt, 1), Vec::new());
        }
        builder
    }
}

fn new_salt(attempt: usize) -> [u8; 16] {
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let seed = format!("{host} {} {} {attempt}", std::process::id(), crate::store::now_unix_ms());
    let mut salt = [0; 16];
    salt.copy_from_slice(&blake3::hash(seed.as_bytes()).as_bytes()[..16]);
    salt
}

/// Compresses frames until there are no more, each by a permit of who puts them into order.
pub(crate) fn compress_frames(
    domain: &Domain,
    level: i32,
    jobs: &Receiver<RawJob>,
    permits: &Receiver<()>,
    out: &Sender<(FrameSequence, PackJob)>,
) {
    while permits.recv().is_ok() {
        let Ok(job) = jobs.recv() else { return };
        let done = match job {
            RawJob::Frame { sequence, raw, chunks } => {
                (sequence, PackJob::Frame { frame: EncodedFrame::encode(domain, &raw, level), chunks })
            }
            RawJob::Flush { sequence } => (sequence, PackJob::Flush),
        };
        if out.send(done).is_err() {
            return;
        }
    }
}

/// Puts frames into packs in order of their numbers until there are no more, and gives a permit for each.
pub(crate) fn fill_packs(
    domain: &Domain,
    packing: Packing,
    frames: &Receiver<(FrameSequence, PackJob)>,
    done: Sender<()>,
    out: &Sender<ClosedPack>,
) {
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    let mut builder = packing.new_pack(domain);
    let mut placed = Vec::new();
    let close = |builder: &mut PackBuilder, placed: &mut Vec<_>| {
        if placed.is_empty() {
            return true;
        }
        let full = std::mem::replace(builder, packing.new_pack(domain));
        let (pack, bytes, footer) = full.finish(domain);
        out.send(ClosedPack { pack, bytes, footer, frames: std::mem::take(placed) }).is_ok()
    };
    for (sequence, job) in frames {
        waiting.insert(sequence, job);
        while let Some(job) = waiting.remove(&next) {
            let full = match job {
                PackJob::Flush => true,
                PackJob::Frame { frame, chunks } => {
                    placed.push((next, builder.push(FrameKind::Pages, &frame, chunks)));
                    builder.is_full()
                }
            };
            next += 1;
            // There are as many permits as there is room for.
            let _ = done.try_send(());
            if full && !close(&mut builder, &mut placed) {
                return;
            }
        }
    }
    close(&mut builder, &mut placed);
}

/// Uploads packs until there are no more, or until one fails.
pub(crate) fn upload_packs(
    store: &Store,
    packs: &Receiver<ClosedPack>,
    out: &Sender<StoredPack>,
    failure: &Failure,
) {
    for closed in packs {
        if failure.is_set() {
            return;
        }
        let object_bytes = closed.bytes.len() as u64;
        if let Err(e) = store.put_content(&store.keys.pack(closed.pack.id), closed.bytes) {
            failure.set(e);
            return;
        }
        let stored =
            StoredPack { pack: closed.pack, object_bytes, footer: closed.footer, frames: closed.frames };
        if out.send(stored).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use crossbeam::channel::{bounded, unbounded};

    use super::*;
    use crate::import::permits;

    /// Compresses frames 1 to 40 while frame 0 is late; how many came out before it did.
    #[test]
    fn a_late_frame_holds_up_the_others_before_they_fill_the_memory() {
        let domain = Domain::plain();
        let (raw_out, raw) = unbounded();
        for sequence in 1..=40 {
            let job = RawJob::Frame { sequence, raw: vec![7; 4096], chunks: vec![ChunkId([7; 32])] };
            raw_out.send(job).unwrap();
        }
        drop(raw_out);
        let (frame_out, frames) = bounded(4);
        let (pack_out, packs) = unbounded();
        let (done, take) = permits(5);
        thread::scope(|scope| {
            // Frame 0 has the first permit, and its worker sleeps until all others are used up.
            take.recv().unwrap();
            let late = frame_out.clone();
            let worker = scope.spawn({
                let (domain, raw, take) = (&domain, &raw, take.clone());
                move || compress_frames(domain, 1, raw, &take, &frame_out)
            });
            let filler = scope.spawn(|| fill_packs(&domain, Packing::default(), &frames, done, &pack_out));
            while raw.len() > 36 || !take.is_empty() {
                thread::yield_now();
            }
            assert_eq!(raw.len(), 36, "four more than the late one, and no further");
            assert!(!worker.is_finished());
            let frame = EncodedFrame::encode(&domain, &[3; 4096], 1);
            late.send((0, PackJob::Frame { frame, chunks: vec![ChunkId([3; 32])] })).unwrap();
            drop(late);
            worker.join().unwrap();
            filler.join().unwrap();
        });
        drop(pack_out);
        let frames: Vec<_> =
            packs.iter().flat_map(|pack| pack.frames).map(|(sequence, _)| sequence).collect();
        assert!(frames.into_iter().eq(0..=40));
    }
}
