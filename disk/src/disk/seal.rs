//! Seals: the overlay as it is now is closed, and a fresh one takes the writes.

use std::sync::{Arc, PoisonError};

use super::Disk;
use crate::{
    error::{DiskError, Result},
    layer::Layer,
    stack::create,
    states::StateRun,
};

/// A layer that takes no more writes: what changed between two seals. It is what a child's image is imported from.
pub struct SealedLayer {
    layer: Arc<Layer>,
}

impl SealedLayer {
    /// The layer's number.
    pub fn number(&self) -> u64 {
        self.layer.number()
    }

    /// The pages that differ from what lies beneath, in page order. Only present ones have bytes to read.
    pub fn changed(&self) -> Vec<StateRun> {
        self.layer.runs()
    }

    /// Reads whole pages that are present, from page `first` on.
    pub fn read(&self, first: u64, into: &mut [u8]) -> Result<()> {
        self.layer.read(first, into)
    }
}

impl Disk {
    /// Makes everything acknowledged so far durable, closes the overlay and opens a fresh one over it.
    ///
    /// The seal is one record in the closed layer's map. A crash before it leaves the old layer live, a crash after it
    /// finds the new one, which is durable by then.
    pub fn seal(&self) -> Result<SealedLayer> {
        let overlay = self.writable()?;
        let _one_at_a_time = overlay.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.budget.refuses_seals() {
            return Err(DiskError::SealsWait { held_bytes: self.budget.held_bytes() });
        }
        let number = overlay.read().live.number();
        // Most of the work is done while requests go on.
        self.flush()?;
        let next = Arc::new(create(&*overlay.directory, &self.identity, number + 1, number)?);
        let mut stack = overlay.write();
        stack.live.seal()?;
        let layer = std::mem::replace(&mut stack.live, next);
        stack.sealed.push(layer.clone());
        Ok(SealedLayer { layer })
    }

    /// Layers that were sealed and wait for their upload, the oldest first.
    pub fn sealed_layers(&self) -> Vec<SealedLayer> {
        let Some(overlay) = &self.overlay else { return Vec::new() };
        let stack = overlay.read();
        stack.sealed.iter().map(|layer| SealedLayer { layer: layer.clone() }).collect()
    }
}
