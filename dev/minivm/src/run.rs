//! The vCPU's thread: entering the guest, serving its ports, stopping.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Flag, MiniVmError, Phase, Timeline};
use crate::sys::kick;
use dormouse_guest::Console;
use dormouse_guest::layout::port;

/// Between two kicks of a vCPU that has been told to stop.
const KICK_INTERVAL: Duration = Duration::from_micros(200);

/// Line status: transmitter empty and idle, always.
const LINE_IDLE: u8 = 0x60;
const LINE_DATA_READY: u8 = 1;

/// A vCPU that runs on a thread of its own, or rests here.
pub(super) struct Runner {
    vcpu: Option<VcpuFd>,
    thread: Option<JoinHandle<VcpuFd>>,
    stop: Flag,
    thread_id: Arc<AtomicI32>,
    console: Console,
    timeline: Timeline,
}

impl Runner {
    pub(super) fn new(vcpu: VcpuFd, console: Console, timeline: Timeline) -> Self {
        Self {
            vcpu: Some(vcpu),
            thread: None,
            stop: Arc::new(AtomicBool::new(false)),
            thread_id: Arc::default(),
            console,
            timeline,
        }
    }

    pub(super) fn console(&self) -> &Console {
        &self.console
    }

    pub(super) fn paused_vcpu(&mut self) -> Option<&mut VcpuFd> {
        self.vcpu.as_mut()
    }

    pub(super) fn resume(&mut self) -> Result<(), MiniVmError> {
        let Some(vcpu) = self.vcpu.take() else { return Ok(()) };
        self.stop.store(false, Ordering::Release);
        self.thread_id.store(0, Ordering::Release);
        let machine = Machine {
            vcpu,
            stop: Arc::clone(&self.stop),
            console: self.console.clone(),
            timeline: self.timeline.clone(),
        };
        let thread_id = Arc::clone(&self.thread_id);
        let thread = std::thread::Builder::new().name("vcpu".to_owned()).spawn(move || {
            thread_id.store(kick::this_thread(), Ordering::Release);
            machine.run()
        });
        self.thread = Some(thread.map_err(MiniVmError::Thread)?);
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Result<(), MiniVmError> {
        self.take_back();
        match self.console.ended() {
            Some(reason) => Err(MiniVmError::Ended { reason }),
            None => Ok(()),
        }
    }

    /// Ends the thread, if there is one, and has the vCPU again.
    fn take_back(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.stop.store(true, Ordering::Release);
        // A kick that comes just before the thread enters the guest is lost, hence more than one. The thread
        // mostly stops without: the guest polls its port all the time.
        while !thread.is_finished() {
            std::thread::sleep(KICK_INTERVAL);
            match self.thread_id.load(Ordering::Acquire) {
                0 => {}
                id => kick::kick(id),
            }
        }
        match thread.join() {
            Ok(vcpu) => self.vcpu = Some(vcpu),
            Err(_) => self.console.end("its vCPU thread panicked"),
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.take_back();
    }
}

/// What the vCPU's thread owns.
struct Machine {
    vcpu: VcpuFd,
    stop: Flag,
    console: Console,
    timeline: Timeline,
}

impl Machine {
    fn run(mut self) -> VcpuFd {
        self.timeline.mark(Phase::FirstEntry);
        let mut left_once = false;
        while !self.stop.load(Ordering::Acquire) {
            let exit = self.vcpu.run();
            if !left_once && exit.is_ok() {
                left_once = true;
                self.timeline.mark(Phase::FirstExit);
            }
            let verdict = match exit {
                Ok(exit) => serve(exit, &self.console, &self.timeline),
                Err(error) if is_interruption(error) => Ok(()),
                Err(error) => Err(format!("KVM cannot run it: {error}")),
            };
            if let Err(reason) = verdict {
                self.console.end(&reason);
                return self.vcpu;
            }
        }
        self.finish_instruction();
        self.vcpu
    }

    /// A port access is completed only by the next entry: enter and leave at once, or it would be lost from
    /// the saved state.
    fn finish_instruction(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        if let Ok(exit) = self.vcpu.run() {
            // KVM honours the flag before it runs the guest, so this is not to be expected.
            tracing::warn!(?exit, "the vCPU left for another reason than it was told to");
        }
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

fn is_interruption(error: kvm_ioctls::Error) -> bool {
    [libc::EINTR, libc::EAGAIN].contains(&error.errno())
}

/// Serves one exit; an error says why the guest cannot go on.
fn serve(exit: VcpuExit<'_>, console: &Console, timeline: &Timeline) -> Result<(), String> {
    match exit {
        VcpuExit::IoIn(port::SERIAL_STATUS, data) => {
            let ready = if console.has_input() { LINE_DATA_READY } else { 0 };
            data.fill(LINE_IDLE | ready);
        }
        VcpuExit::IoIn(port::SERIAL_DATA, data) => data.fill(console.pop_input().unwrap_or(0)),
        VcpuExit::IoIn(_, data) => data.fill(0xff),
        VcpuExit::IoOut(number, data) => output(number, data, console, timeline),
        VcpuExit::Intr => {}
        VcpuExit::Hlt => return Err("it halted, with no interrupt to wake it".to_owned()),
        VcpuExit::Shutdown => return Err("it shut down (a triple fault)".to_owned()),
        VcpuExit::MmioRead(address, _) => {
            return Err(format!("it read {address:#x}, where it has no memory"));
        }
        VcpuExit::MmioWrite(address, _) => {
            return Err(format!("it wrote to {address:#x}, where it has no memory"));
        }
        other => return Err(format!("unexpected exit {other:?}")),
    }
    Ok(())
}

fn output(number: u16, data: &[u8], console: &Console, timeline: &Timeline) {
    let word = || <[u8; 4]>::try_from(data).map(u32::from_le_bytes).ok();
    match number {
        port::SERIAL_DATA => {
            for &byte in data {
                match byte {
                    b'A' => timeline.mark(Phase::FirstAnswer),
                    b'.' => timeline.mark(Phase::FirstPass),
                    _ => {}
                }
                console.say(byte);
            }
        }
        port::WRONG_COUNT => word().into_iter().for_each(|wrong| console.pass_ended(wrong)),
        port::GENERATION => word().into_iter().for_each(|found| console.found_generation(found)),
        port::WRONG_PAGE => word().into_iter().for_each(|page| console.found_wrong(page)),
        _ => {}
    }
}
