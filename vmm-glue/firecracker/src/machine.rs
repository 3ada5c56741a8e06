//! What Firecracker says of its machine before a capture, so that what cannot be captured whole is refused in time.

use serde_json::Value;

use super::api::{ApiClient, ApiError};

/// Why a machine is not known.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Firecracker refused, or could not be asked.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// There is no guest to capture.
    #[error("this Firecracker is {0:?}: only a guest that was started can be put on standby")]
    NotStarted(String),
}

/// Whether the guest runs (or could), as `GET /` has it.
///
/// # Errors
/// [`MachineError`].
pub fn is_running(api: &ApiClient) -> Result<bool, MachineError> {
    state_of(&api.get("/")?)
}

fn state_of(instance: &Value) -> Result<bool, MachineError> {
    match instance.get("state").and_then(Value::as_str) {
        Some("Running") => Ok(true),
        Some("Paused") => Ok(false),
        other => Err(MachineError::NotStarted(other.unwrap_or("in an unknown state").to_owned())),
    }
}

/// Firecracker's version, as `GET /` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl Version {
    /// The first that writes into a memory file that is there. Earlier ones empty it.
    const KEEPS_MEMORY_FILE: Self = Self(1, 6, 0);
    /// The first that can plug memory into a running guest.
    const HOTPLUGS_MEMORY: Self = Self(1, 14, 0);
    /// Those that write differences of more than one memory slot at wrong offsets: firecracker-microvm/firecracker
    /// pull request 5705.
    const MISPLACES_DIFFERENCES: [Self; 2] = [Self(1, 14, 0), Self(1, 14, 1)];

    /// The version in `text`, such as `1.12.1` or `1.14.0-dev`; what is behind the numbers does not count.
    pub fn parse(text: &str) -> Option<Self> {
        let numbers = text.trim_start_matches('v').split(['-', '+']).next()?;
        let mut numbers = numbers.split('.').map(|number| number.parse().ok());
        let version = Self(numbers.next()??, numbers.next()??, numbers.next()??);
        numbers.next().is_none().then_some(version)
    }
}

/// A machine, as its Firecracker describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Whether the guest runs, or could.
    pub is_running: bool,
    /// Firecracker's version, if it is of the form that is known.
    pub version: Option<Version>,
    /// All memory that a snapshot holds, memory that can be plugged in included.
    pub memory_bytes: u64,
    /// Whether memory can be plugged in while the guest runs.
    pub hotplugs_memory: bool,
    /// Whether Firecracker keeps track of dirty pages.
    pub tracks_dirty: bool,
    /// Drives that another process serves (`vhost-user-blk`).
    pub vhost_user_drives: Vec<String>,
}

/// x86 guests have a second memory slot above this.
const ONE_SLOT_BYTES: u64 = 3 << 30;
const MIB: u64 = 1 << 20;

impl Machine {
    /// Asks `api`.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn of(api: &ApiClient) -> Result<Self, MachineError> {
        let instance = api.get("/")?;
        let is_running = state_of(&instance)?;
        let version = instance.get("vmm_version").and_then(Value::as_str).and_then(Version::parse);
        let config = api.get("/machine-config")?;
        let memory_mib = number(&config, "mem_size_mib").ok_or_else(|| ApiError::Response {
            request: "GET /machine-config".into(),
            what: "it does not say how much memory the guest has".into(),
        })?;
        let pluggable_mib = match version.is_none_or(|version| version >= Version::HOTPLUGS_MEMORY) {
            true => pluggable_mib(api)?,
            false => None,
        };
        let all = api.get("/vm/config")?;
        let drives = all.get("drives").and_then(Value::as_array).into_iter().flatten();
        let by_others = drives.filter(|drive| drive.get("socket").is_some_and(|socket| !socket.is_null()));
        let id = |drive: &Value| drive.get("drive_id").and_then(Value::as_str).unwrap_or("?").to_owned();
        Ok(Machine {
            is_running,
            version,
            memory_bytes: memory_mib.saturating_add(pluggable_mib.unwrap_or(0)).saturating_mul(MIB),
            hotplugs_memory: pluggable_mib.is_some(),
            tracks_dirty: config.get("track_dirty_pages").and_then(Value::as_bool).unwrap_or(false),
            vhost_user_drives: by_others.map(id).collect(),
        })
    }

    /// Whether this Firecracker writes differences of such a machine at wrong offsets, and reports success.
    pub fn misplaces_differences(&self) -> bool {
        let affected = self.version.is_some_and(|version| Version::MISPLACES_DIFFERENCES.contains(&version));
        affected && (self.memory_bytes > ONE_SLOT_BYTES || self.hotplugs_memory)
    }

    /// Whether a memory file that is given its size beforehand stays as it is until it is written to.
    pub fn keeps_memory_file(&self) -> bool {
        self.version.is_none_or(|version| version >= Version::KEEPS_MEMORY_FILE)
    }
}

/// Memory that can be plugged in; `None` without such a device.
fn pluggable_mib(api: &ApiClient) -> Result<Option<u64>, ApiError> {
    match api.get("/hotplug/memory") {
        Ok(device) => Ok(Some(number(&device, "total_size_mib").unwrap_or(0))),
        // As every version answers that has no such device, or does not know the path.
        Err(ApiError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn number(of: &Value, field: &str) -> Option<u64> {
    of.get(field).and_then(Value::as_u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(version: &str, memory_bytes: u64) -> Machine {
        Machine {
            is_running: true,
            version: Version::parse(version),
            memory_bytes,
            hotplugs_memory: false,
            tracks_dirty: true,
            vhost_user_drives: Vec::new(),
        }
    }

    #[test]
    fn versions_that_misplace_differences_are_known() {
        for (version, misplaces) in [
            ("1.13.1", false),
            ("1.14.0", true),
            ("v1.14.1-dev", true),
            ("1.14.2", false),
            ("1.15.0", false),
            ("of my own", false),
        ] {
            assert_eq!(machine(version, (3 << 30) + 1).misplaces_differences(), misplaces, "{version}");
            assert!(!machine(version, 3 << 30).misplaces_differences(), "{version}: one slot");
        }
        let plugged = Machine { hotplugs_memory: true, ..machine("1.14.1", 1 << 30) };
        assert!(plugged.misplaces_differences());
    }

    #[test]
    fn text_that_is_no_version_is_none() {
        assert_eq!(Version::parse("1.12.1"), Some(Version(1, 12, 1)));
        for text in ["", "1", "1.2", "1.2.3.4", "a.b.c", "1.2.99999999999"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }
}
