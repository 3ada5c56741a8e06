//! The guest program's work in a plain thread, for machines without `/dev/kvm`.
//!
//! Same memory, same layout, same console and commands; the state lives in the same words of guest memory,
//! so that the state outside it is empty.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vm_memory::GuestMemoryMmap;

use super::layout;
use super::native_work::{Halt, Machine};
use super::state::{State, StateKind};
use super::{Command, Console, DirtyRun, Guest, GuestError, GuestKind, GuestParams};
use dormouse_vmm_common::dirty;

/// A guest in a thread. Dropping it stops the thread; its memory stays with whoever else holds it.
pub struct NativeGuest {
    machine: Option<Machine>,
    thread: Option<JoinHandle<Machine>>,
    stop: Arc<AtomicBool>,
    console: Console,
}

impl NativeGuest {
    /// A guest that will boot and fill `memory`.
    ///
    /// # Errors
    /// [`GuestError::Layout`] if `memory` does not suit `params`.
    pub fn boot(
        memory: GuestMemoryMmap,
        params: &GuestParams,
        track_dirty: bool,
    ) -> Result<Self, GuestError> {
        Self::new(memory, params, track_dirty, false)
    }

    /// A guest that goes on with what `memory` holds, parked until the first command. Touches no memory yet.
    ///
    /// # Errors
    /// [`GuestError::State`] if `state` is not this kind's; [`GuestError::Layout`] as for `boot`.
    pub fn restore(
        memory: GuestMemoryMmap,
        params: &GuestParams,
        state: &[u8],
        track_dirty: bool,
    ) -> Result<Self, GuestError> {
        State::decode_for(state, StateKind::Process)?;
        Self::new(memory, params, track_dirty, true)
    }

    fn new(
        memory: GuestMemoryMmap,
        params: &GuestParams,
        track_dirty: bool,
        booted: bool,
    ) -> Result<Self, GuestError> {
        let params = params.checked()?;
        let spans = layout::fit(&params, &memory)?;
        let console = Console::default();
        let stop = Arc::new(AtomicBool::new(false));
        let machine = Machine {
            memory,
            spans,
            params,
            console: console.clone(),
            stop: Arc::clone(&stop),
            booted,
            parked: booted,
            dirty: track_dirty.then(Default::default),
        };
        Ok(Self { machine: Some(machine), thread: None, stop, console })
    }

    fn ended() -> GuestError {
        GuestError::Ended { reason: "the process guest's thread panicked".to_owned() }
    }
}

impl Guest for NativeGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Process
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn send(&self, command: Command) {
        self.console.push_input(command.byte());
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let Some(mut machine) = self.machine.take() else { return Ok(()) };
        self.stop.store(false, Ordering::Release);
        let thread = std::thread::Builder::new().name("guest".to_owned()).spawn(move || {
            if let Err(Halt::Broken(error)) = machine.run() {
                machine.console.end(&error);
            }
            machine
        });
        self.thread = Some(thread.map_err(GuestError::Thread)?);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.stop.store(true, Ordering::Release);
        self.machine = Some(thread.join().map_err(|_| Self::ended())?);
        match self.console.ended() {
            Some(reason) => Err(GuestError::Ended { reason }),
            None => Ok(()),
        }
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.machine.as_ref().ok_or(GuestError::Running)?;
        Ok(State { kind: StateKind::Process, sections: Vec::new() }.encode())
    }

    fn take_dirty(&mut self) -> Result<Option<Vec<DirtyRun>>, GuestError> {
        let machine = self.machine.as_mut().ok_or(GuestError::Running)?;
        Ok(machine.dirty.as_mut().map(|pages| dirty::join(std::mem::take(pages))))
    }
}

impl Drop for NativeGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
