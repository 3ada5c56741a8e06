//! Resumes from a modelled object store.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dormouse_chunkstore::backend::modelled::{FirstByte, ModelledBackend, StoreModel};
use dormouse_chunkstore::backend::open_url;
use dormouse_chunkstore::{Store, StoreOptions};
use dormouse_restore::Policy;

use crate::guest::{Bench, GUEST_PAGES, fresh, import, name};
use crate::machine::{Machine, open};
use crate::row::Row;
use crate::stats::{median, ms};
use crate::{BenchError, Result};

/// The working set: 24 MiB.
const PAGES: u64 = 24 * 256;
/// Streams that the floor is given.
const STREAMS: f64 = 8.0;
/// Ranges in which a reader in no hurry would ask for a stream.
const RANGE_BYTES: u64 = 8 << 20;

struct Sample {
    first_page: f64,
    ready: f64,
    requests: f64,
}

struct Cold {
    backend: Arc<ModelledBackend>,
    stream_bytes: u64,
}

impl Cold {
    fn new(bench: &Bench) -> Result<Self> {
        let backend = Arc::new(ModelledBackend::new(open_url("memory://")?, None));
        let store = Store::with_backend(backend.clone(), StoreOptions::default());
        import(&store, "guest", &bench.file(), None)?;
        let snapshot = store.open_snapshot(&name("guest")?)?;
        let report = store.build_stream(&snapshot, &bench.working_set(PAGES, 1))?;
        Ok(Cold { backend, stream_bytes: report.stored_bytes })
    }

    /// One resume on a host that knows nothing, from the first request until the working set is in place.
    fn resume(&self, model: StoreModel) -> Result<Sample> {
        let (_mapping, memory) = fresh(GUEST_PAGES, true)?;
        self.backend.set_model(Some(StoreModel { seed: model.seed, ..model }));
        self.backend.take_reads();
        let store = Store::with_backend(self.backend.clone(), StoreOptions::default());
        let start = Instant::now();
        let opened = open(&store, "guest")?;
        opened.decode_ahead(false)?;
        let machine = Machine::wake(&opened, memory, Policy::default())?;
        let filling = machine.install()?;
        while machine.handle.counters().pages_copied == 0 {
            thread::sleep(Duration::from_micros(50));
        }
        let first_page = ms(start.elapsed());
        filling.join().map_err(|_| BenchError::wrong("the thread that installs panicked"))?;
        let ready = ms(start.elapsed());
        machine.end()?;
        let requests = self.backend.take_reads().0 as f64;
        self.backend.set_model(None);
        Ok(Sample { first_page, ready, requests })
    }

    fn rows(&self, bench: &Bench, model: StoreModel, suffix: &str) -> Result<Vec<Row>> {
        if let Some(sampler) = bench.sampler() {
            let name = if suffix.is_empty() { "near" } else { suffix };
            let mut turn = 0;
            sampler.sample(&format!("cold_ready_24mib/{name}"), "ms", &mut || {
                turn += 1;
                Ok(self.resume(StoreModel { seed: turn, ..model })?.ready)
            })?;
            return Ok(Vec::new());
        }
        let mut samples = Vec::new();
        for turn in 0..=bench.times() as u64 {
            let sample = self.resume(StoreModel { seed: turn, ..model })?;
            if turn > 0 {
                samples.push(sample);
            }
        }
        let of = |value: fn(&Sample) -> f64| median(samples.iter().map(value).collect());
        let first_byte = ms(match model.first_byte {
            FirstByte::Fixed(wait) => wait,
            FirstByte::Tailed { median, .. } => median,
        });
        let over = self.stream_bytes as f64 / STREAMS / model.stream_bytes_per_s * 1e3;
        let requests = 2.0 + self.stream_bytes.div_ceil(RANGE_BYTES) as f64;
        let mut rows = vec![
            Row::at_most("cold_first_page", "ms", of(|s| s.first_page), first_byte, 1.25),
            Row::at_most("cold_ready_24mib", "ms", of(|s| s.ready), first_byte + over, 1.25),
            Row::at_most("cold_requests", "requests", of(|s| s.requests), requests, 1.0),
        ];
        if !suffix.is_empty() {
            rows.iter_mut().for_each(|row| {
                *row = Row::reported(
                    &row.name.replacen("cold", &format!("cold_{suffix}"), 1),
                    row.unit,
                    row.value,
                    row.floor,
                );
            });
        }
        Ok(rows)
    }
}

/// `cold_*`: 20 ms to the first byte, 100 MB/s a stream.
pub fn near(bench: &Bench) -> Result<Vec<Row>> {
    Cold::new(bench)?.rows(bench, StoreModel::NEAR, "")
}

/// `cold_tail_*` and `cold_5ms_*`: the same with a heavy tail, and with a fast store.
pub fn others(bench: &Bench) -> Result<Vec<Row>> {
    let cold = Cold::new(bench)?;
    let mut rows = cold.rows(bench, StoreModel::TAILED, "tail")?;
    rows.extend(cold.rows(bench, StoreModel::FAST, "5ms")?);
    Ok(rows)
}
