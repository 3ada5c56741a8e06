//! A frame decoded from its start on, only as far as somebody needs it.
//!
//! A vCPU waits for one page of a frame's 32, and zstd decodes from the front in blocks of 16 or 32 KiB: what lies behind
//! the page can follow once nobody waits. The whole frame is verified before its first byte is decoded.

use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::{
    domain::Domain,
    error::FormatError,
    frame::{Codec, FrameRef, check_size, decompress_lz4_into},
};

/// Contexts kept for the next frames: each takes a few hundred KiB to set up.
const SPARE_CONTEXTS: usize = 32;

/// What zstd wants to see first of a frame: the least its header can have.
const FIRST_BYTES: usize = 5;

const UNDECODABLE: FormatError = FormatError::Undecodable("frame");

/// Of all threads: the one that begins a frame is seldom the one that ends it.
static CONTEXTS: Mutex<Vec<DCtx<'static>>> = Mutex::new(Vec::new());

fn contexts() -> MutexGuard<'static, Vec<DCtx<'static>>> {
    CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A verified frame, decoded as far as [`FramePrefix::reach`] was asked to.
pub struct FramePrefix {
    /// The frame as zstd made it.
    compressed: Vec<u8>,
    /// Of which so much was given to the decoder.
    fed: usize,
    /// What the decoder wants next; 0 once the frame is whole.
    hint: usize,
    raw: Vec<u8>,
    raw_bytes: usize,
    /// `None` once nothing is left to be decoded.
    context: Option<DCtx<'static>>,
}

impl std::fmt::Debug for FramePrefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FramePrefix({} of {} bytes)", self.raw.len(), self.raw_bytes)
    }
}

impl FrameRef {
    /// Verifies and opens the frame's stored bytes, and decodes nothing of a zstd frame yet. `raw` is a buffer to decode into, used
    /// again: its content is forgotten.
    ///
    /// # Errors
    /// As [`FrameRef::decode`]; what is wrong with a zstd frame itself shows in [`FramePrefix::reach`].
    pub fn begin(
        &self,
        domain: &Domain,
        stored: Vec<u8>,
        mut raw: Vec<u8>,
    ) -> Result<FramePrefix, FormatError> {
        let opened = match self.verified(domain, &stored)? {
            std::borrow::Cow::Owned(opened) => Some(opened),
            std::borrow::Cow::Borrowed(_) => None,
        };
        let compressed = opened.unwrap_or(stored);
        let raw_bytes = self.raw_bytes as usize;
        match self.codec {
            Codec::Raw if compressed.len() != raw_bytes => Err(UNDECODABLE),
            Codec::Raw => {
                let (compressed, raw) = (Vec::new(), compressed);
                Ok(FramePrefix { compressed, fed: 0, hint: 0, raw, raw_bytes, context: None })
            }
            // Half the time that zstd needs, and not to be interrupted.
            Codec::Lz4 => {
                decompress_lz4_into(&compressed, raw_bytes, &mut raw)?;
                Ok(FramePrefix { compressed, fed: 0, hint: 0, raw, raw_bytes, context: None })
            }
            Codec::Zstd => {
                raw.clear();
                check_size(&compressed, raw_bytes, "frame")?;
                raw.reserve_exact(raw_bytes);
                let context = Some(context()?);
                Ok(FramePrefix { compressed, fed: 0, hint: FIRST_BYTES, raw, raw_bytes, context })
            }
        }
    }
}

impl FramePrefix {
    /// Decodes on until at least the first `bytes` raw bytes are there, or all that the frame has.
    ///
    /// # Errors
    /// [`FormatError::Undecodable`], though its hash was right: whoever wrote the frame wrote no frame. What was decoded
    /// before stays.
    pub fn reach(&mut self, bytes: usize) -> Result<(), FormatError> {
        let wanted = bytes.min(self.raw_bytes);
        // The last block is not over before its end was seen, which is checked too.
        while self.raw.len() < wanted || (wanted == self.raw_bytes && self.hint != 0) {
            self.step()?;
        }
        if self.hint == 0 && self.context.is_some() {
            if self.raw.len() != self.raw_bytes || self.fed != self.compressed.len() {
                return Err(UNDECODABLE);
            }
            self.give_back();
        }
        Ok(())
    }

    /// Gives the decoder exactly what it asked for, which is one block: so it copies none of it, and stops behind it.
    fn step(&mut self) -> Result<(), FormatError> {
        let context = self.context.as_mut().ok_or(UNDECODABLE)?;
        let end = self.fed.saturating_add(self.hint).min(self.compressed.len());
        if self.hint == 0 || end == self.fed {
            return Err(UNDECODABLE);
        }
        let mut input = InBuffer::around(&self.compressed[self.fed..end]);
        let at = self.raw.len();
        let mut output = OutBuffer::around_pos(&mut self.raw, at);
        self.hint = context.decompress_stream(&mut output, &mut input).map_err(|_| UNDECODABLE)?;
        if input.pos() == 0 {
            return Err(UNDECODABLE);
        }
        self.fed += input.pos();
        Ok(())
    }

    /// What is decoded so far.
    pub fn bytes(&self) -> &[u8] {
        &self.raw
    }

    /// Bytes the frame has once it is whole.
    pub fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    /// Whether [`FramePrefix::reach`] has come to the end: all of its bytes are there.
    pub fn is_whole(&self) -> bool {
        self.context.is_none() && self.raw.len() == self.raw_bytes
    }

    /// What was decoded, and the memory the compressed bytes were in, to be used again.
    pub fn into_buffers(mut self) -> (Vec<u8>, Vec<u8>) {
        self.give_back();
        (self.raw, self.compressed)
    }

    fn give_back(&mut self) {
        let Some(context) = self.context.take() else { return };
        let mut spare = contexts();
        if spare.len() < SPARE_CONTEXTS {
            spare.push(context);
        }
    }
}

/// A context that decodes straight into the buffer it is given, which stays the same from step to step.
fn context() -> Result<DCtx<'static>, FormatError> {
    let spare = contexts().pop();
    let mut context = match spare {
        Some(context) => context,
        None => {
            let mut new = DCtx::try_create().ok_or(UNDECODABLE)?;
            new.set_parameter(DParameter::StableOutBuffer(true)).map_err(|_| UNDECODABLE)?;
            new
        }
    };
    context.reset(ResetDirective::SessionOnly).map_err(|_| UNDECODABLE)?;
    Ok(context)
}
