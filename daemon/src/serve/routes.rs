//! The routes: which request is answered by what. docs/openapi.json describes each.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Query, State as Shared},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{MethodRouter, get, post},
};
use dormouse_core::Name;
use serde::Deserialize;

use super::{
    answer::{Answer, json, ok},
    api::{ListenRequest, ListenerList, Nothing, StandbyRequest, StopRequest, VmList, WakeRequest},
    body::{Json, Named},
    listener, operations,
    state::Daemon,
    wake,
};
use crate::{
    commands::{ls, show},
    failure::Failure,
};

/// The description of all routes.
pub(crate) const OPENAPI: &str = include_str!("../../../docs/openapi.json");
/// Longest time that a request waits for a VM's end.
const WAIT_S_MAX: u64 = 600;

type Daemons = Shared<Arc<Daemon>>;
type Route = (&'static str, &'static [&'static str], MethodRouter<Arc<Daemon>>);

/// Every path, its methods, and what answers them.
fn table() -> Vec<Route> {
    vec![
        ("/v1/health", &["get"], get(health)),
        ("/openapi.json", &["get"], get(openapi)),
        ("/metrics", &["get"], get(metrics)),
        ("/v1/vms", &["get", "post"], get(list_vms).post(wake_vm)),
        ("/v1/vms/{id}", &["get"], get(show_vm)),
        ("/v1/vms/{id}/standby", &["post"], post(standby_vm)),
        ("/v1/vms/{id}/stop", &["post"], post(stop_vm)),
        ("/v1/vms/{id}/detach", &["post"], post(detach_vm)),
        ("/v1/standby", &["post"], post(standby_any)),
        ("/v1/listeners", &["get", "post"], get(list_listeners).post(listen)),
        ("/v1/listeners/{id}", &["get", "delete"], get(show_listener).delete(end_listener)),
        ("/v1/snapshots", &["get"], get(list_snapshots)),
        ("/v1/snapshots/{name}", &["get"], get(show_snapshot)),
    ]
}

/// All routes, for `daemon`.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    let mut router = Router::new();
    for (path, _, methods) in table() {
        router = router.route(path, methods);
    }
    router
        .fallback(async || Failure::new("no_such_route", "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            Failure::new("no_such_method", "this path does not take that method")
        })
        .with_state(daemon)
}

/// What is counted, and nothing else.
pub(super) fn counts(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .fallback(async || Failure::new("no_such_route", "only /metrics is here; ask at the control socket"))
        .with_state(daemon)
}

async fn health(Shared(daemon): Daemons) -> Answer {
    ok(&daemon.health())
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn metrics(Shared(daemon): Daemons) -> Answer {
    let text = daemon.metrics.text(daemon.now())?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn list_vms(Shared(daemon): Daemons) -> Answer {
    ok(&VmList { vms: daemon.documents() })
}

async fn wake_vm(Shared(daemon): Daemons, Json(request): Json<WakeRequest>) -> Answer {
    let (vm, new) = wake::wake(&daemon, request).await?;
    json(created(new), &vm)
}

fn created(new: bool) -> StatusCode {
    if new { StatusCode::CREATED } else { StatusCode::OK }
}

#[derive(Deserialize)]
struct Wait {
    /// Wait so long for the VM's end.
    #[serde(default)]
    wait_s: u64,
}

async fn show_vm(
    Shared(daemon): Daemons,
    Named(id): Named,
    wait: Result<Query<Wait>, axum::extract::rejection::QueryRejection>,
) -> Answer {
    let Query(wait) = wait.map_err(|e| Failure::new("bad_request", e.body_text()))?;
    let vm = daemon.vm(&id)?;
    if wait.wait_s > 0 {
        vm.wait_over(Duration::from_secs(wait.wait_s.min(WAIT_S_MAX))).await;
    }
    ok(&vm.document())
}

async fn standby_vm(
    Shared(daemon): Daemons,
    Named(id): Named,
    Json(request): Json<StandbyRequest>,
) -> Answer {
    let vm = daemon.vm(&id)?;
    ok(&operations::standby(&daemon, &vm, request).await?)
}

async fn standby_any(Shared(daemon): Daemons, Json(request): Json<StandbyRequest>) -> Answer {
    ok(&operations::standby_at(&daemon, request).await?)
}

async fn stop_vm(Shared(daemon): Daemons, Named(id): Named, Json(request): Json<StopRequest>) -> Answer {
    ok(&operations::stop(&daemon.vm(&id)?, request).await?)
}

async fn detach_vm(Shared(daemon): Daemons, Named(id): Named, _: Json<Nothing>) -> Answer {
    let vm = daemon.vm(&id)?;
    ok(&operations::detach(&vm).await?)
}

async fn list_listeners(Shared(daemon): Daemons) -> Answer {
    ok(&ListenerList { listeners: daemon.listeners().iter().map(|l| l.document()).collect() })
}

async fn listen(Shared(daemon): Daemons, Json(request): Json<ListenRequest>) -> Answer {
    let (listener, new) = blocking(move || listener::listen(&daemon, request)).await?;
    json(created(new), &listener)
}

async fn show_listener(Shared(daemon): Daemons, Named(id): Named) -> Answer {
    ok(&daemon.listener(&id)?.document())
}

async fn end_listener(Shared(daemon): Daemons, Named(id): Named) -> Answer {
    let listener = daemon.listener(&id)?;
    listener.stop();
    daemon.remove_listener(&id);
    ok(&listener.document())
}

async fn list_snapshots(Shared(daemon): Daemons) -> Answer {
    // The service may be older than its store.
    let document = blocking(move || match ls::Document::of(&daemon.store) {
        Err(failure) if failure.kind == "nothing_stored" => Ok(ls::Document::empty(&daemon.store)),
        document => document,
    });
    ok(&document.await?)
}

async fn show_snapshot(Shared(daemon): Daemons, Named(name): Named) -> Answer {
    let name = Name::new(&name).map_err(|e| Failure::usage(e.to_string()))?;
    let document = blocking(move || show::Document::of(&daemon.store.open_snapshot(&name)?));
    ok(&document.await?)
}

/// Work that waits for disks, stores or other processes, off the threads that answer requests.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(Failure::new("bug", panic.to_string())))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn every_route_is_described_and_everything_described_is_a_route() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys().filter(|k| *k != "parameters");
                methods.map(|method| (path.clone(), method.clone()))
            })
            .collect();
        let served = table().into_iter();
        let served: BTreeSet<_> = served
            .flat_map(|(path, methods, _)| methods.iter().map(|m| (path.to_owned(), (*m).to_owned())))
            .collect();
        assert_eq!(described, served);
    }

    /// Generators take an integer without one for 32 bits, and all counts and times for errors.
    #[test]
    fn every_integer_is_described_as_one_of_64_bits() {
        fn check(at: &Value) {
            let is_integer = match &at["type"] {
                Value::String(kind) => kind == "integer",
                Value::Array(kinds) => kinds.contains(&"integer".into()),
                _ => false,
            };
            assert!(!is_integer || at["format"] == "int64", "{at}");
            at.as_object().into_iter().flat_map(|o| o.values()).for_each(check);
            at.as_array().into_iter().flatten().for_each(check);
        }
        check(&serde_json::from_str(OPENAPI).unwrap());
    }

    #[test]
    fn every_code_is_described() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let described =
            document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
                .as_array()
                .unwrap()
                .iter()
                .map(|c| c.as_str().unwrap());
        let codes = super::super::codes::CODES.iter().map(|(code, ..)| *code);
        assert!(described.eq(codes));
    }
}
