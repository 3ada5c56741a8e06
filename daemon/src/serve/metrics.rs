//! `GET /metrics`: what Prometheus scrapes, in the OpenMetrics text format.

use std::fmt::Error;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use super::{counted::StoreMetrics, totals::Totals};
use crate::{commands::standby, failure::Failure, machine::wake};

/// Bounds for what takes milliseconds to minutes, in seconds.
const BOUNDS_S: [f64; 14] =
    [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0];
/// Powers of two of microseconds that fault latencies are told in: the last is 16 s.
const FAULT_BUCKETS: usize = 25;

type ByLabel<L, M> = Family<L, M, fn() -> M>;

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ByResult {
    result: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ByPhase {
    phase: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ByHow {
    how: &'static str,
}

/// What is counted as it happens. What VMs count themselves is asked of them when somebody looks.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    resumes: Family<ByResult, Counter>,
    resume_seconds: Histogram,
    phase_seconds: ByLabel<ByPhase, Histogram>,
    standbys: Family<ByResult, Counter>,
    pause_seconds: Histogram,
    durable_seconds: Histogram,
    ended: Family<ByHow, Counter>,
}

/// What is asked for at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub(super) struct Now {
    /// VMs by their state.
    pub(super) vms: Vec<(&'static str, u64)>,
    pub(super) listeners: u64,
    /// Of all VMs there ever were.
    pub(super) totals: Totals,
    pub(super) since_unix_ms: u64,
    pub(super) stopping: bool,
}

fn histogram() -> Histogram {
    Histogram::new(BOUNDS_S)
}

impl Metrics {
    pub(super) fn new(store: &StoreMetrics) -> Self {
        let metrics = Metrics {
            registry: Registry::default(),
            resumes: Family::default(),
            resume_seconds: histogram(),
            phase_seconds: Family::new_with_constructor(histogram as fn() -> Histogram),
            standbys: Family::default(),
            pause_seconds: histogram(),
            durable_seconds: histogram(),
            ended: Family::default(),
        };
        let mut registry = Registry::with_prefix("dormouse");
        registry.register("resumes", "Resumes by how they went", metrics.resumes.clone());
        let seconds = || Unit::Seconds;
        registry.register_with_unit(
            "resume",
            "From the request until the guest ran",
            seconds(),
            metrics.resume_seconds.clone(),
        );
        registry.register_with_unit(
            "resume_phase",
            "From the request until a phase of a resume was reached",
            seconds(),
            metrics.phase_seconds.clone(),
        );
        registry.register("standbys", "Standbys by how they went", metrics.standbys.clone());
        registry.register_with_unit(
            "standby_pause",
            "How long guests stood still for a standby",
            seconds(),
            metrics.pause_seconds.clone(),
        );
        registry.register_with_unit(
            "standby_durable",
            "From the request until a standby was durable in the store",
            seconds(),
            metrics.durable_seconds.clone(),
        );
        registry.register("vms_ended", "VMs whose process ended", metrics.ended.clone());
        // Counters that are there from the start, at nothing: a rate over one that appears with its first event misses it.
        drop(metrics.resumes.get_or_create(&ByResult { result: "ok" }));
        drop(metrics.standbys.get_or_create(&ByResult { result: "ok" }));
        for how in ["ended", "standby", "killed"] {
            drop(metrics.ended.get_or_create(&ByHow { how }));
        }
        store.register(&mut registry);
        Metrics { registry, ..metrics }
    }

    pub(super) fn resumed(&self, resume: &wake::Document) {
        self.resumes.get_or_create(&ByResult { result: "ok" }).inc();
        self.resume_seconds.observe(resume.resumed_us as f64 / 1e6);
        for phase in &resume.phases {
            let label = ByPhase { phase: phase.name.clone() };
            self.phase_seconds.get_or_create(&label).observe(phase.at_us as f64 / 1e6);
        }
    }

    pub(super) fn resume_failed(&self, code: &'static str) {
        self.resumes.get_or_create(&ByResult { result: code }).inc();
    }

    pub(super) fn slept(&self, standby: &Result<standby::Document, Failure>) {
        let result = standby.as_ref().map_or_else(|failure| failure.kind, |_| "ok");
        self.standbys.get_or_create(&ByResult { result }).inc();
        if let Ok(standby) = standby {
            self.pause_seconds.observe(standby.pause_us as f64 / 1e6);
            self.durable_seconds.observe(standby.durable_us as f64 / 1e6);
        }
    }

    pub(super) fn ended(&self, how: &'static str) {
        self.ended.get_or_create(&ByHow { how }).inc();
    }

    /// The whole exposition.
    pub(super) fn text(&self, now: Now) -> Result<String, Failure> {
        let mut asked = Registry::with_prefix("dormouse");
        asked.register_collector(Box::new(now));
        let mut out = String::new();
        let encoded = text::encode_registry(&mut out, &self.registry)
            .and_then(|()| text::encode_registry(&mut out, &asked))
            .and_then(|()| text::encode_eof(&mut out));
        encoded.map_err(|e| Failure::new("bug", format!("metrics cannot be written: {e}")))?;
        Ok(out)
    }
}

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut vms = encoder.encode_descriptor("vms", "VMs by state", None, MetricType::Gauge)?;
        for (state, count) in &self.vms {
            ConstGauge::new(*count as i64).encode(vms.encode_family(&[("state", *state)])?)?;
        }
        let stopping = i64::from(self.stopping);
        for (name, help, value) in [
            ("listeners", "Sockets that Firecrackers may come to", self.listeners as i64),
            ("stopping", "Whether the daemon is about to end", stopping),
            ("start_time_seconds", "When the daemon was started", (self.since_unix_ms / 1000) as i64),
        ] {
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(encoder)?;
        }
        let c = &self.totals.counters;
        let installed = c.pages_copied + c.zero_pages;
        let mut pages =
            encoder.encode_descriptor("pages_installed", "Pages installed", None, MetricType::Counter)?;
        for (source, count) in
            [("demand", installed.saturating_sub(c.prefetched_pages)), ("prefetch", c.prefetched_pages)]
        {
            ConstCounter::new(count).encode(pages.encode_family(&[("source", source)])?)?;
        }
        for (name, help, count) in [
            ("faults", "Page faults", c.faults),
            ("stale_faults", "Page faults for pages that had come meanwhile", c.stale_faults),
            ("zero_pages", "Pages installed as zeros", c.zero_pages),
            ("frames_fetched", "Frames asked of the store or its caches", c.fetches),
            ("fetch_retries", "Fetches repeated after an error", c.retries),
            ("pages_given_back", "Ranges that guests gave back", c.removes),
            ("pages_withheld", "Errors for which pages were withheld", self.totals.failures),
            ("vms_killed", "VMs killed rather than given a wrong page", self.totals.killed),
        ] {
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(count).encode(encoder)?;
        }
        let mut latency = encoder.encode_descriptor(
            "fault_latency",
            "From reading a fault to having installed its page",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        let faults = &self.totals.fault_latency;
        let bucket = |i: usize| faults.log2_us.get(i).copied().unwrap_or(0);
        let mut buckets: Vec<_> = (0..FAULT_BUCKETS).map(|i| ((1u64 << i) as f64 / 1e6, bucket(i))).collect();
        buckets.push((f64::INFINITY, faults.log2_us.iter().skip(FAULT_BUCKETS).sum()));
        latency.encode_histogram::<NoLabelSet>(faults.sum_us as f64 / 1e6, faults.count(), &buckets, None)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use super::*;

    #[test]
    fn what_is_scraped_counts_what_happened() {
        let metrics = Metrics::new(&StoreMetrics::default());
        metrics.resume_failed("vmm");
        metrics.ended("standby");
        let mut now = Now { vms: vec![("running", 3)], listeners: 2, ..Now::default() };
        now.totals.counters.pages_copied = 10;
        now.totals.counters.prefetched_pages = 4;
        now.totals.fault_latency.log2_us = vec![1, 0, 5];
        now.totals.fault_latency.sum_us = 16;
        let text = metrics.text(now).unwrap();
        for line in [
            "dormouse_resumes_total{result=\"vmm\"} 1",
            "dormouse_vms_ended_total{how=\"standby\"} 1",
            "dormouse_vms{state=\"running\"} 3",
            "dormouse_listeners 2",
            "dormouse_pages_installed_total{source=\"demand\"} 6",
            "dormouse_pages_installed_total{source=\"prefetch\"} 4",
            "dormouse_fault_latency_seconds_bucket{le=\"0.000004\"} 6",
            "dormouse_fault_latency_seconds_bucket{le=\"+Inf\"} 6",
            "dormouse_fault_latency_seconds_count 6",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
