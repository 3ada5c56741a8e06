//! Cloud Hypervisor's HTTP API, as far as offload needs it (`vmm/src/api/openapi/cloud-hypervisor.yaml`).

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use dormouse_vmm_common::{HttpClient, HttpError};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmApiError {
    /// Cloud Hypervisor refused.
    #[error("Cloud Hypervisor refused {request} with status {status}: {said}")]
    Refused {
        /// Method and path.
        request: String,
        /// HTTP status.
        status: u16,
        /// Its own words, outermost first.
        said: String,
    },
    /// What came back is not an answer it could have given, or none came.
    #[error("{request}: {what}; is it Cloud Hypervisor's API socket?")]
    Failed {
        /// Method and path.
        request: String,
        /// What is wrong.
        what: String,
    },
    /// It has no guest that could be put on standby.
    #[error("this Cloud Hypervisor's VM is {0}: only one that runs, or is paused, can be put on standby")]
    NotStarted(String),
    /// A path cannot be told to it.
    #[error("{0:?} is not UTF-8, which Cloud Hypervisor's API needs")]
    Path(std::path::PathBuf),
}

impl From<HttpError> for VmmApiError {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Refused { request, status, said } => {
                // A JSON array: an error and what caused it, and so on.
                let chain = serde_json::from_str::<Vec<String>>(&said);
                let said = chain.map_or(said, |chain| chain.join(": "));
                VmmApiError::Refused { request, status, said }
            }
            HttpError::Response { request, what } => VmmApiError::Failed { request, what },
            HttpError::Io { request, source, .. } => {
                VmmApiError::Failed { request, what: source.to_string() }
            }
        }
    }
}

/// A client of one Cloud Hypervisor.
#[derive(Clone, Debug)]
pub struct VmmApi {
    client: HttpClient,
}

impl VmmApi {
    /// A client of the Cloud Hypervisor whose API socket is at `socket`. A request may take `timeout`.
    pub fn new(socket: &Path, timeout: Duration) -> Self {
        Self { client: HttpClient::new(socket, timeout) }
    }

    /// Whether there is a guest that runs, or is paused.
    ///
    /// # Errors
    /// [`VmmApiError`], here and below.
    pub fn check_started(&self) -> Result<(), VmmApiError> {
        let info = self.client.get("/api/v1/vm.info")?;
        match info.get("state").and_then(Value::as_str) {
            Some("Running" | "Paused") => Ok(()),
            other => Err(VmmApiError::NotStarted(other.unwrap_or("in an unknown state").to_owned())),
        }
    }

    /// Sends the VM to who listens at `socket`; may return before that is done.
    #[expect(clippy::missing_errors_doc, reason = "see check_started")]
    pub fn send_migration(&self, socket: &Path) -> Result<(), VmmApiError> {
        let body = json!({"destination_url": url(socket)?, "local": true});
        Ok(self.client.put("/api/v1/vm.send-migration", &body)?)
    }

    /// Listens at `socket` for a VM and returns when it is there.
    #[expect(clippy::missing_errors_doc, reason = "see check_started")]
    pub fn receive_migration(&self, socket: &Path, on_demand: bool) -> Result<(), VmmApiError> {
        let mode = if on_demand { "Postcopy" } else { "Precopy" };
        let body = json!({"receiver_url": url(socket)?, "memory_mode": mode});
        Ok(self.client.put("/api/v1/vm.receive-migration", &body)?)
    }
}

fn url(socket: &Path) -> Result<String, VmmApiError> {
    let not_utf8 = || VmmApiError::Path(socket.to_owned());
    socket.to_str().map(|path| format!("unix:{path}")).ok_or_else(not_utf8)
}
