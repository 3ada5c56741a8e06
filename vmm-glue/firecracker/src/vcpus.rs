//! How far the vCPUs of a Firecracker have come: a guest that was not on a processor since has changed nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use dormouse_vmm_common::vmm_process::VmmProcess;

/// How Firecracker calls its vCPU threads.
const VCPU_THREAD: &str = "fc_vcpu";
/// How long threads that were just told to stand still may take to do so.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_micros(200);

/// Per vCPU thread, how often it left a processor. A vCPU that runs at all between two readings, for an instant, leaves
/// one in between; one that is on a processor now gives no reading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuMarks(BTreeMap<u32, u64>);

impl VcpuMarks {
    /// Reads them of a guest that stands still.
    ///
    /// # Errors
    /// It does not stand still, or is none of Firecracker's.
    pub fn of(process: &VmmProcess) -> io::Result<Self> {
        let begun = Instant::now();
        let mut before = None;
        loop {
            let now = read(process.peer().pid)?;
            // A thread that goes to sleep is seen asleep an instant before that is counted.
            if now.is_some() && now == before {
                return now.ok_or_else(|| io::ErrorKind::Other.into());
            }
            if begun.elapsed() > PATIENCE {
                return Err(io::Error::other("its vCPUs do not stand still"));
            }
            before = now;
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}

/// `None` while one of them is on a processor.
fn read(pid: i32) -> io::Result<Option<VcpuMarks>> {
    let mut marks = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?;
        let comm = fs::read_to_string(thread.path().join("comm"))?;
        if !comm.starts_with(VCPU_THREAD) {
            continue;
        }
        let status = fs::read_to_string(thread.path().join("status"))?;
        let Some(left) = left_processor(&status) else { return Ok(None) };
        let number = thread.file_name().to_str().and_then(|n| n.parse().ok());
        marks.insert(number.ok_or(io::ErrorKind::InvalidData)?, left);
    }
    if marks.is_empty() {
        return Err(io::Error::other("it has no vCPU threads"));
    }
    Ok(Some(VcpuMarks(marks)))
}

/// How often the thread with this `status` left a processor; `None` if it is on one.
fn left_processor(status: &str) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let asleep = field("State:").is_some_and(|state| state.starts_with(['S', 'D']));
    let count = |name| field(name).and_then(|text| text.parse::<u64>().ok());
    let (own, other) = (count("voluntary_ctxt_switches:")?, count("nonvoluntary_ctxt_switches:")?);
    asleep.then_some(own + other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_on_a_processor_gives_no_reading() {
        let status = |state| {
            format!(
                "Name:\tfc_vcpu 0\nState:\t{state}\nvoluntary_ctxt_switches:\t10\nnonvoluntary_ctxt_switches:\t2\n"
            )
        };
        assert_eq!(left_processor(&status("S (sleeping)")), Some(12));
        assert_eq!(left_processor(&status("R (running)")), None);
        assert_eq!(left_processor("State:\tS (sleeping)\n"), None);
    }
}
