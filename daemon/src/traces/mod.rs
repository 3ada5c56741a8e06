//! Traces: spans of VMs and of what is done with them, exported by OTLP if somebody asks for that.
//!
//! Nothing here may disturb a VM: spans wait for the collector in a bounded queue and are dropped beyond it, on a
//! thread of their own; at the end it is given a moment. Without `--otlp` and the environment's word there is neither
//! thread nor queue.
//!
//! | module | holds |
//! |---|---|
//! | `export` | the exporter, and what is logged of it |
//! | `span` | what is told of a VM and an operation |

mod export;
mod span;

use std::{env, time::Duration};

use clap::Args;
use opentelemetry::{global, trace::TracerProvider as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

pub(crate) use self::span::{
    Phases, continue_from, name_it, operation, outcome, served, tell, traceparent, vm,
};
use crate::failure::Failure;

/// What the service is called, unless `OTEL_SERVICE_NAME` says otherwise.
const SERVICE: &str = "dormouse";
/// How long the collector may take over what is left at the end. Somebody waits for this process.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Where spans are exported to.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct TraceArgs {
    /// Export spans of VMs, and of what is done with them, to the OpenTelemetry collector at this URL, by OTLP over
    /// HTTP: http://localhost:4318 [default: OTEL_EXPORTER_OTLP_ENDPOINT; without either, none are]
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
}

impl TraceArgs {
    /// The URL that spans go to, if somebody wants them. `None` in it: what the environment says.
    fn wanted(&self) -> Option<Option<String>> {
        let set = |name: &str| env::var(name).is_ok_and(|value| !value.trim().is_empty());
        let is = |name: &str, what: &str| env::var(name).is_ok_and(|value| value.eq_ignore_ascii_case(what));
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return None;
        }
        match &self.otlp {
            Some(url) => Some(Some(format!("{}/v1/traces", url.trim_end_matches('/')))),
            None if set("OTEL_EXPORTER_OTLP_ENDPOINT") || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") => {
                Some(None)
            }
            None => None,
        }
    }
}

/// The export of spans, for as long as this process runs.
#[derive(Debug, Default)]
pub(crate) struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Begins, if `args` or the environment ask for it.
    ///
    /// # Errors
    /// What was asked for makes no sense. Whether a collector is there is not looked at.
    pub(crate) fn begin(args: Option<&TraceArgs>) -> Result<Self, Failure> {
        let Some(url) = args.and_then(TraceArgs::wanted) else { return Ok(Traces(None)) };
        let exporter = export::exporter(url)?;
        let mut resource = Resource::builder();
        let named = env::var("OTEL_SERVICE_NAME").is_ok_and(|name| !name.is_empty())
            || env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|all| all.contains("service.name="));
        if !named {
            resource = resource.with_service_name(SERVICE);
        }
        let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.with_attribute(version).build())
            .build();
        global::set_tracer_provider(provider.clone());
        Ok(Traces(Some(provider)))
    }

    /// What hands spans over; `None` if nobody wants them.
    pub(crate) fn layer<S>(&self) -> Option<impl Layer<S> + use<S>>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let tracer = self.0.as_ref()?.tracer(SERVICE);
        // Of our own only: an exporter that tells of itself would never come to an end.
        let ours = Targets::new().with_target(SERVICE, LevelFilter::INFO);
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        let layer =
            layer.with_location(false).with_target(false).with_threads(false).with_tracked_inactivity(false);
        Some(layer.with_context_activation(false).with_filter(ours))
    }

    /// Sends what is left, as far as the collector takes it without delay.
    pub(crate) fn end(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown_with_timeout(END_PATIENCE)
        {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}
