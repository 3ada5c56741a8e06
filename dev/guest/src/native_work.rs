//! What the guest program does, step by step as in `program.S`, on guest memory from outside.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::layout::{self, Span, state as at};
use super::{Console, GuestParams, pattern};

/// What a process guest's thread owns.
pub(super) struct Machine {
    pub(super) memory: GuestMemoryMmap,
    pub(super) spans: Vec<Span>,
    pub(super) params: GuestParams,
    pub(super) console: Console,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) booted: bool,
    pub(super) parked: bool,
    pub(super) dirty: Option<BTreeSet<u64>>,
}

/// Why the machine stopped.
pub(super) enum Halt {
    /// It was asked to.
    Paused,
    /// It cannot go on.
    Broken(String),
}

impl Machine {
    /// Works until it is stopped or cannot go on.
    pub(super) fn run(&mut self) -> Result<(), Halt> {
        if !self.booted {
            self.boot()?;
        }
        loop {
            if self.parked {
                self.wait()?;
            }
            // A pause or command in the middle of a pass drops the pass; the next one starts afresh.
            if self.answer()? && self.verify()? {
                for _ in 0..self.params.idle_polls {
                    if self.poll()? {
                        break;
                    }
                    std::thread::yield_now();
                }
            }
        }
    }

    fn boot(&mut self) -> Result<(), Halt> {
        self.console.say(b'B');
        for page in 0..self.params.pages {
            self.check_stop()?;
            self.write_page(page, 0)?;
        }
        self.set32(layout::STATE_ADDR + at::GENERATION, 0)?;
        self.booted = true;
        self.console.say(b'R');
        Ok(())
    }

    fn answer(&mut self) -> Result<bool, Halt> {
        let params = self.params;
        let generation = self.get32(layout::STATE_ADDR + at::GENERATION)?;
        let pages = || pattern::answer_pages(params.pages, params.answer_stride(), params.answer_pages);
        let mut sum = 0u64;
        for page in pages() {
            sum = sum.wrapping_add(self.get64(layout::DATA_ADDR + page * layout::PAGE_BYTES)?).rotate_left(1);
        }
        let right = sum == pattern::answer_sum(params.seed, generation, pages());
        self.console.say(if right { b'A' } else { b'x' });
        Ok(true)
    }

    /// Verifies every page; false if a command broke in.
    fn verify(&mut self) -> Result<bool, Halt> {
        let generation = self.get32(layout::STATE_ADDR + at::GENERATION)?;
        let mut wrong = 0;
        for page in 0..self.params.pages {
            if page % 64 == 0 && self.poll()? {
                return Ok(false);
            }
            if !self.page_is_right(page, generation)? {
                wrong += 1;
                self.console.found_wrong(page as u32);
            }
        }
        self.console.pass_ended(wrong);
        self.console.found_generation(generation);
        self.console.say(if wrong == 0 { b'.' } else { b'X' });
        Ok(true)
    }

    fn page_is_right(&self, page: u64, current: u32) -> Result<bool, Halt> {
        let generation = pattern::generation_of(page, current);
        let word = pattern::word(self.params.seed, page, generation);
        let mut right = self.get32(layout::GENERATIONS_ADDR + page * 4)? == generation;
        for offset in pattern::WORD_OFFSETS {
            right &= self.get64(layout::DATA_ADDR + page * layout::PAGE_BYTES + offset)? == word;
        }
        Ok(right)
    }

    fn mutate(&mut self) -> Result<(), Halt> {
        let next = self.get32(layout::STATE_ADDR + at::GENERATION)?.wrapping_add(1);
        let lane = u64::from(next) % pattern::LANES;
        for page in (lane..self.params.pages).step_by(pattern::LANES as usize) {
            self.write_page(page, next)?;
        }
        self.set32(layout::STATE_ADDR + at::GENERATION, next)?;
        self.console.say(b'M');
        Ok(())
    }

    fn write_page(&mut self, page: u64, generation: u32) -> Result<(), Halt> {
        let word = pattern::word(self.params.seed, page, generation);
        for offset in pattern::WORD_OFFSETS {
            self.set64(layout::DATA_ADDR + page * layout::PAGE_BYTES + offset, word)?;
        }
        self.set32(layout::GENERATIONS_ADDR + page * 4, generation)
    }

    /// Takes a waiting command, if any; true if there was one.
    fn poll(&mut self) -> Result<bool, Halt> {
        self.check_stop()?;
        let Some(byte) = self.console.pop_input() else { return Ok(false) };
        self.parked = false;
        match byte {
            b'm' => self.mutate()?,
            b'p' => {
                self.console.say(b'p');
                self.parked = true;
            }
            b'g' => {
                let generation = self.get32(layout::STATE_ADDR + at::GENERATION)?;
                for byte in format!("g{generation:08x}").bytes() {
                    self.console.say(byte);
                }
                self.parked = true;
            }
            _ => {}
        }
        Ok(true)
    }

    fn wait(&mut self) -> Result<(), Halt> {
        while self.parked {
            if !self.poll()? {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    fn check_stop(&self) -> Result<(), Halt> {
        if self.stop.load(Ordering::Acquire) { Err(Halt::Paused) } else { Ok(()) }
    }

    fn address(&self, linear: u64) -> Result<vm_memory::GuestAddress, Halt> {
        layout::physical(&self.spans, linear)
            .ok_or_else(|| Halt::Broken(format!("no memory at linear address {linear:#x}")))
    }

    fn get32(&self, linear: u64) -> Result<u32, Halt> {
        self.memory.load(self.address(linear)?, Ordering::Relaxed).map_err(broken)
    }

    fn get64(&self, linear: u64) -> Result<u64, Halt> {
        self.memory.load(self.address(linear)?, Ordering::Relaxed).map_err(broken)
    }

    fn set32(&mut self, linear: u64, value: u32) -> Result<(), Halt> {
        let address = self.address(linear)?;
        self.mark(address);
        self.memory.store(value, address, Ordering::Relaxed).map_err(broken)
    }

    fn set64(&mut self, linear: u64, value: u64) -> Result<(), Halt> {
        let address = self.address(linear)?;
        self.mark(address);
        self.memory.store(value, address, Ordering::Relaxed).map_err(broken)
    }

    fn mark(&mut self, address: vm_memory::GuestAddress) {
        if let Some(dirty) = &mut self.dirty {
            dirty.insert(address.0 / layout::PAGE_BYTES);
        }
    }
}

fn broken(error: vm_memory::GuestMemoryError) -> Halt {
    Halt::Broken(error.to_string())
}
