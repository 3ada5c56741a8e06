//! An OpenTelemetry collector: OTLP over HTTP, in protobuf, as far as the exporter speaks it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use prost::Message as _;

use crate::scene::wait_until;

/// A span, and whose it is.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) service: String,
    pub(crate) name: String,
    pub(crate) trace: Vec<u8>,
    pub(crate) id: Vec<u8>,
    pub(crate) parent: Vec<u8>,
    pub(crate) nanos: (u64, u64),
    pub(crate) events: Vec<String>,
    /// 0 for not said, 1 for good, 2 for bad.
    pub(crate) status: i32,
    attributes: Vec<KeyValue>,
}

impl Span {
    /// An attribute, as text.
    pub(crate) fn told(&self, key: &str) -> String {
        text(&self.attributes, key)
    }

    pub(crate) fn is_below(&self, parent: &Span) -> bool {
        self.parent == parent.id && self.trace == parent.trace
    }
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|a| a.key == key).and_then(|a| a.value.as_ref()?.value.as_ref());
    match found {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => other.map_or_else(String::new, |other| format!("{other:?}")),
    }
}

/// Listens until the test ends.
pub(crate) struct Collector {
    pub(crate) url: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let spans = Arc::new(Mutex::new(Vec::new()));
        let heard = spans.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let heard = heard.clone();
                std::thread::spawn(move || while take(&stream, &heard).is_some() {});
            }
        });
        Collector { url, spans }
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    /// The one span with this name and this VM, or of any VM.
    pub(crate) fn one(&self, name: &str, vm: Option<&str>) -> Span {
        let is_it = |s: &&Span| s.name == name && vm.is_none_or(|vm| s.told("dormouse.vm.id") == vm);
        wait_until(&format!("the span {name}"), || self.spans().iter().any(|s| is_it(&s)));
        let spans = self.spans();
        let mut found = spans.iter().filter(is_it);
        let span = found.next().unwrap().clone();
        assert!(found.next().is_none(), "{name} came twice: {spans:?}");
        span
    }

    /// The phases below `operation`, by when they began.
    pub(crate) fn phases(&self, operation: &Span) -> Vec<Span> {
        let mut phases = self.spans();
        phases.retain(|s| s.is_below(operation));
        phases.sort_by_key(|s| s.nanos);
        for pair in phases.windows(2) {
            assert_eq!(pair[0].nanos.1, pair[1].nanos.0, "each phase follows the one before: {phases:?}");
        }
        for phase in &phases {
            let within = phase.nanos.0 >= operation.nanos.0 && phase.nanos.1 <= operation.nanos.1;
            assert!(within, "{phase:?} is not within {operation:?}");
        }
        phases
    }
}

/// Takes one request off a connection.
fn take(stream: &TcpStream, heard: &Mutex<Vec<Span>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let line = line.trim().to_lowercase();
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    assert_eq!(head[0], "post /v1/traces http/1.1");
    assert!(head.contains(&"content-type: application/x-protobuf".to_owned()), "{head:?}");
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    let request = ExportTraceServiceRequest::decode(&body[..]).unwrap();
    for of_resource in request.resource_spans {
        let service = text(&of_resource.resource.unwrap().attributes, "service.name");
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            heard.lock().unwrap().push(Span {
                service: service.clone(),
                name: span.name,
                trace: span.trace_id,
                id: span.span_id,
                parent: span.parent_span_id,
                nanos: (span.start_time_unix_nano, span.end_time_unix_nano),
                events: span.events.into_iter().map(|e| e.name).collect(),
                status: span.status.map_or(0, |s| s.code),
                attributes: span.attributes,
            });
        }
    }
    let mut stream = stream;
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n")
        .ok()
}
