//! Kicking a thread out of `KVM_RUN` by a signal whose handler does nothing.

use std::io;
use std::sync::OnceLock;

/// A no-op: its only purpose is that the signal's arrival makes `KVM_RUN` return `EINTR`.
extern "C" fn ignore(_signal: libc::c_int) {}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the no-op handler, once per process.
///
/// # Errors
/// The operating system's, should `sigaction` refuse.
pub(crate) fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int) = ignore;
        // SAFETY: all-zero bytes are a valid `sigaction`: no flags, an empty mask, the default handler.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        // SAFETY: `action` is initialised, and its handler touches nothing, so it is async-signal-safe.
        let result = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    done.map_err(io::Error::from_raw_os_error)
}

/// The calling thread's id, to be given to [`kick`].
pub(crate) fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Interrupts the blocking system call thread `tid` of this process is in, if any. A thread that has ended
/// is not an error: there is nothing left to interrupt.
pub(crate) fn kick(tid: i32) {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: `tgkill` takes three integers and cannot touch memory; the signal's handler is a no-op.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal()) };
}
