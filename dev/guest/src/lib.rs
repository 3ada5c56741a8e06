//! The guest program, and what its two hosts have in common.
//!
//! The program fills pages with a pattern that differs per page and generation, then for ever answers (reads
//! at least 256 scattered pages and checks them) and verifies every page. It says what it found by single
//! bytes on a serial port, see [`Console`], and takes single-byte commands, see [`Command`].
//!
//! `dormouse-minivm` runs it on `/dev/kvm`, Firecracker runs it from an ELF file ([`elf`]), and
//! [`native::NativeGuest`] does the same work in a plain thread, where there is no `/dev/kvm`.
//!
//! For tests and the demo; not published. All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

pub mod console;
pub mod elf;
pub mod layout;
pub mod native;
mod native_work;
pub mod params;
pub mod pattern;
pub mod state;
#[expect(unsafe_code, reason = "the program is assembled into this binary and found by its symbols")]
mod sys;

use std::time::Duration;

pub use console::{Console, ConsoleError};
pub use layout::LayoutError;
pub use params::GuestParams;

pub use dormouse_vmm_common::DirtyRun;

/// The guest program's machine code, to be loaded at [`layout::PROGRAM_ADDR`] and entered at its first byte
/// in 64-bit mode; `None` where this build has none, because it is for another architecture than x86-64.
pub fn program() -> Option<&'static [u8]> {
    sys::program::bytes()
}

/// What enters [`program`] where a VMM boots by PVH, see [`elf::pvh_executable`].
pub fn entry32() -> Option<&'static [u8]> {
    sys::program::entry32()
}

/// What the guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer now, then verify, and so on.
    Answer,
    /// Go to the next generation: rewrite one eighth of the pages; says `M`. Then answer and verify.
    Mutate,
    /// Wait for the next command and do nothing else; says `p`.
    Park,
    /// Say `g` and the generation in eight hexadecimal digits, then wait as if parked.
    Generation,
}

impl Command {
    /// The byte that stands for it on the serial port.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Answer => b'a',
            Self::Mutate => b'm',
            Self::Park => b'p',
            Self::Generation => b'g',
        }
    }
}

/// What runs the guest program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// A virtual machine on `/dev/kvm`.
    Kvm,
    /// A plain thread of a process, on the same memory.
    Process,
}

impl GuestKind {
    /// `"kvm"` or `"process"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }
}

/// A machine running the guest program, whatever it runs on.
///
/// It is created paused. Between [`Guest::pause`] and [`Guest::resume`] nothing of it runs, so its memory
/// stands still.
pub trait Guest: Send {
    /// What it runs on.
    fn kind(&self) -> GuestKind;

    /// What it has said so far. The handle stays good while the guest runs.
    fn console(&self) -> &Console;

    /// Sends a command; it is taken when the guest next polls, within 64 pages of verification.
    fn send(&self, command: Command);

    /// Starts or continues.
    ///
    /// # Errors
    /// [`GuestError::Vmm`] if the thread cannot be had. Nothing happens if it runs already.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Stops between two instructions, and returns when it has.
    ///
    /// # Errors
    /// [`GuestError::Vmm`] with what ended it, if it had ended by itself.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// The state outside its memory, as bytes only [`state`] understands. The guest must be paused.
    ///
    /// # Errors
    /// [`GuestError::Running`] if it is not, [`GuestError::Vmm`] if the state cannot be read.
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError>;

    /// The pages written since the last call (or since it was created), in address order, neighbours joined;
    /// `None` if this guest was created without tracking them. Host-side writes are not among them.
    ///
    /// # Errors
    /// [`GuestError::Vmm`].
    fn take_dirty(&mut self) -> Result<Option<Vec<DirtyRun>>, GuestError>;
}

/// Why a guest could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest has to be paused for this.
    #[error("the guest is running: pause it first")]
    Running,
    /// Its memory or parameters do not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Its saved state cannot be used.
    #[error(transparent)]
    State(#[from] state::StateError),
    /// No thread could be had.
    #[error("no thread for the guest: {0}")]
    Thread(std::io::Error),
    /// The guest has ended, by itself or because its host could not run it.
    #[error("the guest has ended: {reason}")]
    Ended {
        /// What ended it.
        reason: String,
    },
    /// The VMM failed.
    #[error(transparent)]
    Vmm(Box<dyn std::error::Error + Send + Sync>),
    /// It did not say what was waited for.
    #[error(transparent)]
    Console(#[from] ConsoleError),
}

/// Parks the guest, waits until it says so, and pauses it: so that the next [`Command::Answer`] is answered
/// at once, as an idle machine would answer a request.
///
/// # Errors
/// [`GuestError::Console`] if it does not park within `timeout`; else as [`Guest::pause`].
pub fn park_and_pause(guest: &mut dyn Guest, timeout: Duration) -> Result<(), GuestError> {
    let parked = guest.console().count(b'p');
    guest.send(Command::Park);
    guest.console().wait_for(b'p', parked + 1, timeout)?;
    guest.pause()
}
