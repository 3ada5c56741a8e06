//! The exporter: OTLP over HTTP, and a word in the log when the collector goes away and comes back.

use std::sync::atomic::{AtomicBool, Ordering};

use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SpanData, SpanExporter},
};

use crate::failure::Failure;

/// Says once that spans cannot be exported, and once that they can again: a collector may be away for days.
#[derive(Debug)]
pub(super) struct Told<E> {
    inner: E,
    away: AtomicBool,
}

/// The exporter to `url`, or to where the environment says.
pub(super) fn exporter(url: Option<String>) -> Result<Told<Otlp>, Failure> {
    let mut builder = Otlp::builder().with_http();
    if let Some(url) = &url {
        // The exporter would find out with the first span only.
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        if !matches!(scheme, Some("http" | "https")) {
            return Err(Failure::usage(format!("--otlp {url}: give a URL such as http://localhost:4318")));
        }
        builder = builder.with_endpoint(url);
    }
    let built = builder.build();
    built.map(Told::new).map_err(|e| Failure::usage(format!("the export of traces cannot be set up: {e}")))
}

impl<E> Told<E> {
    fn new(inner: E) -> Self {
        Told { inner, away: AtomicBool::new(false) }
    }
}

impl<E: SpanExporter> SpanExporter for Told<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        match &result {
            Err(error) if !self.away.swap(true, Ordering::Relaxed) => {
                tracing::warn!(%error, "spans cannot be exported, and are dropped until they can");
            }
            Ok(()) if self.away.swap(false, Ordering::Relaxed) => tracing::info!("spans are exported again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
