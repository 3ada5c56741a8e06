//! The floors: what the kernel takes when nobody looks after anything.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_core::{PAGE_BYTES, PageIndex};
use dormouse_restore::Memory;
use dormouse_restore::outcome::Outcome;
use dormouse_restore::sys::event::Event;
use dormouse_restore::sys::uffd::EventBuffer;

use crate::guest::fresh;
use crate::{BenchError, Result};

/// One UFFDIO_COPY.
const STEP_BYTES: usize = 2 << 20;

/// Copies all runs into fresh memory in steps of 2 MiB, and nothing else; how long that took.
pub fn copy_all(runs: &[(PageIndex, Vec<u8>)], pages: u64) -> Result<Duration> {
    let (_mapping, memory) = fresh(pages, false)?;
    let start = Instant::now();
    for (first, bytes) in runs {
        for (i, step) in bytes.chunks(STEP_BYTES).enumerate() {
            copy(&memory, first.0 + (i * STEP_BYTES / PAGE_BYTES) as u64, step)?;
        }
    }
    Ok(start.elapsed())
}

fn copy(memory: &Memory, first: u64, bytes: &[u8]) -> Result<()> {
    let pages = memory.regions()[0].pages(first, (bytes.len() / PAGE_BYTES) as u64);
    match pages.map(|p| p.copy(bytes)) {
        Some(Outcome::Done) => Ok(()),
        other => Err(BenchError::wrong(format!("a raw copy to page {first} ended as {other:?}"))),
    }
}

/// Answers the faults of `memory` while `work` runs: reads an event, asks `page` for its bytes, copies them.
pub fn serving<T>(
    memory: &Memory,
    page: impl Fn(u64, &mut [u8; PAGE_BYTES]) + Sync,
    work: impl FnOnce() -> T,
) -> T {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut events = EventBuffer::new(1);
            let mut bytes = [0; PAGE_BYTES];
            while !over.load(Ordering::Relaxed) {
                for event in memory.uffd().read_events(&mut events).into_iter().flatten() {
                    if let Event::Fault { address, .. } = event
                        && let Some((_, at)) = memory.find(address)
                    {
                        page(at, &mut bytes);
                        // If it fails, the one who waits shows it.
                        let _ = copy(memory, at, &bytes);
                    }
                }
                std::hint::spin_loop();
            }
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        done
    })
}

/// Frames compressed by zstd alone.
#[derive(Debug)]
pub struct PlainFrames(Vec<(Vec<u8>, usize)>);

impl PlainFrames {
    /// Compresses each of `frames`.
    pub fn of<'a>(frames: impl Iterator<Item = &'a [u8]>, level: i32) -> Result<Self> {
        let one = |raw: &[u8]| Ok((zstd::bulk::compress(raw, level)?, raw.len()));
        let all: std::io::Result<Vec<_>> = frames.map(one).collect();
        Ok(PlainFrames(all.map_err(BenchError::file("compressing"))?))
    }

    /// Decodes all on `workers` threads, each into one buffer; how long that took.
    pub fn decode_all(&self, workers: usize) -> Duration {
        let next = AtomicUsize::new(0);
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    let Ok(mut zstd) = zstd::bulk::Decompressor::new() else { return };
                    let mut into = Vec::new();
                    while let Some((stored, raw)) = self.0.get(next.fetch_add(1, Ordering::Relaxed)) {
                        into.clear();
                        into.reserve(*raw);
                        let _ = zstd.decompress_to_buffer(stored, &mut into);
                        std::hint::black_box(&into);
                    }
                });
            }
        });
        start.elapsed()
    }

    /// How long each takes by itself, on this thread.
    pub fn decode_each(&self) -> Vec<Duration> {
        let Ok(mut zstd) = zstd::bulk::Decompressor::new() else { return Vec::new() };
        let mut into = Vec::with_capacity(self.0.iter().map(|f| f.1).max().unwrap_or(0));
        let mut one = |(stored, _): &(Vec<u8>, usize)| {
            into.clear();
            let start = Instant::now();
            let _ = zstd.decompress_to_buffer(stored, &mut into);
            std::hint::black_box(&into);
            start.elapsed()
        };
        self.0.iter().map(&mut one).collect()
    }
}
