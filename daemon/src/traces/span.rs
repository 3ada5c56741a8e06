//! What is told of a VM and of an operation, beyond what the log has: attributes, phases, outcome, and whose trace it
//! belongs to. All of it does nothing where no spans are exported.

use std::{
    borrow::Cow,
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use dormouse_firecracker::SessionReport;
use opentelemetry::{
    Value, global,
    propagation::TextMapPropagator as _,
    trace::{Span as _, Status, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::failure::Failure;

/// Does something with a VM inside a span of its own, for who has no daemon.
pub(crate) fn operation<T>(
    kind: &'static str,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let span = tracing::info_span!("operation", kind);
    name_it(&span, kind);
    let result = span.in_scope(work);
    outcome(&span, &result);
    result
}

/// The span of a VM, for who has no daemon.
pub(crate) fn vm(name: &str) -> Span {
    let span = tracing::info_span!("vm", snapshot = name);
    tell(&span, "dormouse.name", name.to_owned());
    span
}

/// Gives an operation's span its name; in the log it is a field.
pub(crate) fn name_it(span: &Span, name: &'static str) {
    let context = span.context();
    if context.has_active_span() {
        context.span().update_name(name);
    }
}

/// Tells one thing of what `span` is about.
pub(crate) fn tell(span: &Span, key: &'static str, value: impl Into<Value>) {
    span.set_attribute(key, value);
}

/// How it went.
pub(crate) fn outcome<T>(span: &Span, result: &Result<T, Failure>) {
    match result {
        Ok(_) => span.set_status(Status::Ok),
        Err(failure) => {
            tell(span, "error.type", failure.kind);
            span.set_status(Status::error(failure.message.clone()));
        }
    }
}

/// What was served of a VM until its end.
pub(crate) fn served(span: &Span, report: &SessionReport) {
    let counted = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    tell(span, "process.pid", i64::from(report.pid));
    tell(span, "dormouse.faults", counted(report.counters.faults));
    tell(span, "dormouse.pages_prefetched", counted(report.counters.prefetched_pages));
    tell(span, "dormouse.fetches", counted(report.counters.fetches));
    if let Some(why) = &report.killed_because {
        span.set_status(Status::error(why.clone()));
    }
}

/// Where `span` stands, as W3C has it, for another process to continue from.
pub(crate) fn traceparent(span: &Span) -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove("traceparent")
}

/// Makes `span`, which must be new, part of the trace that `traceparent` names. What makes no sense is left alone.
pub(crate) fn continue_from(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract(&carrier);
    if context.span().span_context().is_valid() {
        // It is new, so that only the lack of an exporter is in the way.
        let _ = span.set_parent(context);
    }
}

/// The phases of an operation, told as spans below the current one when this is dropped: of an operation that failed
/// those that it came through.
#[derive(Debug)]
pub(crate) struct Phases {
    begun: SystemTime,
    clock: Instant,
    reached: Vec<(&'static str, Duration)>,
    noted: Vec<(Cow<'static, str>, Duration)>,
}

impl Phases {
    /// The operation begins.
    pub(crate) fn begin() -> Self {
        Phases { begun: SystemTime::now(), clock: Instant::now(), reached: Vec::new(), noted: Vec::new() }
    }

    /// A phase is over; the next begins.
    pub(crate) fn over(&mut self, name: &'static str) {
        self.reached.push((name, self.clock.elapsed()));
    }

    /// Something happened on the way, so long after the beginning.
    pub(crate) fn note(&mut self, what: String, after: Duration) {
        self.noted.push((what.into(), after));
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        let span = Span::current();
        let context = span.context();
        if !context.has_active_span() {
            return;
        }
        let (tracer, mut from) = (global::tracer(super::SERVICE), self.begun);
        for (name, after) in self.reached.drain(..) {
            let to = self.begun + after;
            let phase = tracer.span_builder(name).with_start_time(from);
            phase.start_with_context(&tracer, &context).end_with_timestamp(to);
            from = to;
        }
        for (what, after) in self.noted.drain(..) {
            span.add_event_with_timestamp(what, self.begun + after, Vec::new());
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::{
        error::OTelSdkResult,
        trace::{SdkTracerProvider, SpanData, SpanExporter},
    };
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct InMemory(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for InMemory {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    #[test]
    fn what_a_process_leaves_is_continued_by_the_next_in_the_same_trace() {
        let exporter = InMemory::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let before = tracing::info_span!("before");
            let left = traceparent(&before).unwrap();
            drop(before);
            for (name, from) in [("after", left.as_str()), ("nonsense", "00-zz")] {
                let after = tracing::info_span!("after", name);
                continue_from(&after, from);
            }
        });
        let spans = exporter.0.lock().unwrap();
        assert_eq!(spans[1].span_context.trace_id(), spans[0].span_context.trace_id());
        assert_eq!(spans[1].parent_span_id, spans[0].span_context.span_id());
        assert_ne!(spans[2].span_context.trace_id(), spans[0].span_context.trace_id());
    }

    #[test]
    fn without_an_exporter_there_is_nothing_to_continue_from() {
        let span = tracing::info_span!("vm");
        continue_from(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(traceparent(&span), None);
    }
}
