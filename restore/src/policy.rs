//! What a restore may decide differently from VM to VM.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::RestoreError;

pub use dormouse_core::policy::Retry;

/// Ends the VM, and says why. Called once, on a thread of its own, while the VM is served on: it may take its time, but
/// must not end the restore, which waits for it.
pub type KillVm = Arc<dyn Fn(&RestoreError) + Send + Sync>;

/// What is done when a page a vCPU waits for cannot be had correctly. Zeros are not an answer.
#[derive(Clone)]
pub enum FailClosed {
    /// Let the vCPU wait, and say so in [`RestoreHandle::failures`](crate::RestoreHandle::failures): right whatever
    /// runs the guest, and the page may still come by another way.
    Hold,
    /// Poison the page: the access raises SIGBUS in the VMM or a machine check in the guest. Only where the processor
    /// runs the guest: seen under nested virtualisation, where the hypervisor emulates guest code, a poisoned page was
    /// taken for device memory and the guest ran on. If the kernel
    /// cannot poison (before Linux 6.6) the vCPU keeps waiting and [`RestoreError`] says so; with a kill
    /// function, it is called instead.
    Poison {
        /// What to do where poisoning is not possible.
        or_kill: Option<KillVm>,
    },
    /// End the VM. Its vCPU stays blocked until then. Not for a store that refuses ([`SourceErrorKind::Denied`]): that is
    /// held, whatever the policy.
    ///
    /// [`SourceErrorKind::Denied`]: crate::SourceErrorKind::Denied
    Kill(KillVm),
}

impl fmt::Debug for FailClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailClosed::Hold => "Hold",
            FailClosed::Poison { .. } => "Poison",
            FailClosed::Kill(_) => "Kill",
        })
    }
}

/// The settings of one restore.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Threads that only answer faults. At least one.
    pub demand_workers: usize,
    /// Threads that prefetch when no fault waits for them.
    pub prefetch_workers: usize,
    /// Pages installed for a fault in a run of zeros, at most: touching fresh memory tends to go on.
    pub zero_step_pages: u64,
    /// Pages installed by one ioctl at most (512: 2 MiB). Where the guest can give pages back, a quarter
    /// MiB at most is used, because reading events waits for installs under way.
    pub step_pages: u64,
    /// How long the fault thread looks for the next fault before it sleeps. Sleeping and waking costs more
    /// than answering a fault; spinning costs a core.
    pub spin: Duration,
    /// Decoded frames kept because the image shows them in more than one place.
    pub decoded_frames: usize,
    /// Repetition of failed fetches.
    pub retry: Retry,
    /// What is done when repetition does not help.
    pub fail_closed: FailClosed,
    /// First touches recorded at most.
    pub record_pages: usize,
    /// First touches are recorded for this long from the start.
    pub record_window: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            demand_workers: 2,
            prefetch_workers: 2,
            zero_step_pages: 64,
            step_pages: 512,
            spin: Duration::from_micros(80),
            decoded_frames: 16,
            retry: Retry::default(),
            fail_closed: FailClosed::Hold,
            record_pages: 256 * 1024,
            record_window: Duration::from_secs(60),
        }
    }
}
