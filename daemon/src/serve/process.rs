//! A VM's process, held by a descriptor for as long as the daemon knows the VM.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use dormouse_firecracker::VmmProcess;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// A process, and no other that gets its number later.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Another hold of `vmm`, which must be alive.
    pub(super) fn of(vmm: &VmmProcess) -> io::Result<Self> {
        let pid = vmm.peer().pid;
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())?;
        // Alive now, so the number was its own when it was opened.
        if vmm.has_ended()? {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Process { pid, pidfd })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended, after `patience` at most.
    pub(super) fn wait_ended(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let pidfd = self.pidfd.as_fd();
            match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Kills it. One that has ended is as good as killed.
    pub(super) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
