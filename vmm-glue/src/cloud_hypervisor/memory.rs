//! Which memory slot lies where: read from the `Config` payload, of which nothing else is interpreted.

use serde::Deserialize;

/// Most slots a VM may have.
pub const SLOTS_MAX: usize = 512;
const PAGE_BYTES: u64 = 4096;

/// A run of guest memory in one memfd. All fields are multiples of a page but the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// Its number, which `MemoryFd` carries.
    pub slot: u32,
    /// First guest-physical address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// Where it starts in its memfd; not zero where slots share one.
    pub file_offset: u64,
}

/// Why the slots cannot be read from a configuration.
#[derive(Debug, thiserror::Error)]
pub enum MemorySlotsError {
    /// Not the JSON expected.
    #[error("the VM's configuration is not as Cloud Hypervisor sends it: {0}")]
    Json(#[from] serde_json::Error),
    /// None, or too many.
    #[error("the VM has {0} memory slots: 1 to {SLOTS_MAX} are allowed")]
    Count(usize),
    /// A slot is impossible.
    #[error("memory slot {slot}: {what}")]
    Slot {
        /// Its number.
        slot: u32,
        /// What is wrong.
        what: &'static str,
    },
}

#[derive(Deserialize)]
struct Config {
    memory_manager_data: MemoryManager,
}

#[derive(Deserialize)]
struct MemoryManager {
    guest_ram_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
struct Mapping {
    slot: u32,
    gpa: u64,
    size: u64,
    file_offset: u64,
    #[serde(default)]
    virtio_mem: bool,
}

/// The memory slots of the VM whose `Config` payload this is, by ascending address.
///
/// # Errors
/// [`MemorySlotsError`]; also for hot-pluggable (virtio-mem) slots, of which the protocol does not say which
/// blocks are plugged.
pub fn memory_slots(config: &[u8]) -> Result<Vec<MemorySlot>, MemorySlotsError> {
    let mappings = serde_json::from_slice::<Config>(config)?.memory_manager_data.guest_ram_mappings;
    if mappings.is_empty() || mappings.len() > SLOTS_MAX {
        return Err(MemorySlotsError::Count(mappings.len()));
    }
    let mut slots = mappings.iter().map(check).collect::<Result<Vec<_>, _>>()?;
    slots.sort_by_key(|slot| slot.address);
    for pair in slots.windows(2) {
        if pair[0].address + pair[0].bytes > pair[1].address {
            return Err(MemorySlotsError::Slot { slot: pair[1].slot, what: "overlaps another in memory" });
        }
    }
    let mut numbers: Vec<u32> = slots.iter().map(|slot| slot.slot).collect();
    numbers.sort_unstable();
    match numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(MemorySlotsError::Slot { slot: pair[0], what: "is there twice" }),
        None => Ok(slots),
    }
}

fn check(mapping: &Mapping) -> Result<MemorySlot, MemorySlotsError> {
    let Mapping { slot, gpa: address, size: bytes, file_offset, virtio_mem } = *mapping;
    let bad = |what| Err(MemorySlotsError::Slot { slot, what });
    if virtio_mem {
        return bad("is hot-pluggable (virtio-mem), which is not supported: use plain memory");
    }
    if bytes == 0 || (address | bytes | file_offset) % PAGE_BYTES != 0 {
        return bad("is empty or not made of whole pages");
    }
    if address.checked_add(bytes).is_none() || file_offset.checked_add(bytes).is_none() {
        return bad("goes past the end of addresses");
    }
    Ok(MemorySlot { slot, address, bytes, file_offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mappings: &str) -> Vec<u8> {
        format!(r#"{{"vm_config":{{}},"memory_manager_data":{{"guest_ram_mappings":[{mappings}]}}}}"#).into()
    }

    #[test]
    fn slots_are_read_in_order_of_address() {
        let text = config(
            r#"{"slot":1,"gpa":4294967296,"size":8192,"file_offset":4096,"zone_id":"mem0"},
               {"slot":0,"gpa":0,"size":4096,"file_offset":0,"virtio_mem":false}"#,
        );
        let slots = memory_slots(&text).expect("valid");
        assert_eq!(slots[0], MemorySlot { slot: 0, address: 0, bytes: 4096, file_offset: 0 });
        assert_eq!(slots[1], MemorySlot { slot: 1, address: 1 << 32, bytes: 8192, file_offset: 4096 });
    }

    #[test]
    fn impossible_slots_are_named() {
        let slot = |slot, gpa: u64, size: u64| {
            format!(r#"{{"slot":{slot},"gpa":{gpa},"size":{size},"file_offset":0}}"#)
        };
        for (text, part) in [
            (String::new(), "0 memory slots"),
            (slot(3, 0, 0), "slot 3: is empty"),
            (slot(3, 1, 4096), "whole pages"),
            (slot(3, u64::MAX - 4095, 8192), "past the end"),
            (format!("{},{}", slot(3, 0, 8192), slot(4, 4096, 4096)), "slot 4: overlaps"),
            (format!("{},{}", slot(3, 0, 4096), slot(3, 4096, 4096)), "slot 3: is there twice"),
            (r#"{"slot":0,"gpa":0,"size":4096,"file_offset":0,"virtio_mem":true}"#.into(), "virtio-mem"),
        ] {
            let error = memory_slots(&config(&text)).expect_err("must be refused").to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
    }
}
