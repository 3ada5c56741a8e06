//! Which memory slot lies where, and in which image of a snapshot.
//!
//! The former is read from the `Config` payload, of which little else is interpreted (`GuestRamMapping` in Cloud
//! Hypervisor's `vmm/src/memory_manager.rs`). The latter is in the image's name: Cloud Hypervisor makes one memory
//! file for each region, and each file becomes an image.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

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
    /// Whether it can be plugged piece by piece: much of it may never be used.
    pub pluggable: bool,
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

/// What the memory image is called where a VM has only one memory file.
const ONLY: &str = "memory";

/// Which slots an image holds, as its name says: `memory` holds all of them, `memory-0-2` slots 0 and 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredIn {
    /// All slots of the VM.
    All,
    /// These.
    Slots(Vec<u32>),
}

impl StoredIn {
    /// Whether `slot` is in it.
    pub fn holds(&self, slot: u32) -> bool {
        match self {
            StoredIn::All => true,
            StoredIn::Slots(slots) => slots.contains(&slot),
        }
    }

    /// From an image's name; `None` if it is none of ours.
    pub fn parse(name: &str) -> Option<Self> {
        let numbers = name.strip_prefix(ONLY)?;
        if numbers.is_empty() {
            return Some(StoredIn::All);
        }
        let slots = numbers.strip_prefix('-')?.split('-').map(number).collect::<Option<Vec<u32>>>()?;
        let ascending = slots.windows(2).all(|pair| pair[0] < pair[1]);
        (ascending && slots.len() <= SLOTS_MAX).then_some(StoredIn::Slots(slots))
    }
}

impl fmt::Display for StoredIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ONLY)?;
        match self {
            StoredIn::All => Ok(()),
            StoredIn::Slots(slots) => slots.iter().try_for_each(|slot| write!(f, "-{slot}")),
        }
    }
}

/// The name of an image that holds `slots`; `None` if that would be too long for a name.
pub fn stored_in(mut slots: Vec<u32>) -> Option<StoredIn> {
    slots.sort_unstable();
    let stored = StoredIn::Slots(slots);
    (stored.to_string().len() <= dormouse_core::limits::NAME_BYTES_MAX).then_some(stored)
}

/// A number in its only form.
fn number(text: &str) -> Option<u32> {
    let number = text.parse::<u32>().ok()?;
    (number.to_string() == text).then_some(number)
}

/// A device of the VM that another process runs, and that maps guest memory on its own; `None` if there is none.
///
/// Pages that are not there yet would read as zero in that process, which no userfaultfd of the VMM's guards.
pub fn foreign_device(config: &[u8]) -> Option<&'static str> {
    let config = serde_json::from_slice::<Value>(config).ok()?;
    let vm = config.get("vm_config")?;
    let list = |key: &str| vm.get(key).and_then(Value::as_array).into_iter().flatten();
    let by_vhost = |device: &Value| device.get("vhost_user").and_then(Value::as_bool) == Some(true);
    let any = |key| list(key).next().is_some();
    [
        ("a vhost-user disk", list("disks").any(by_vhost)),
        ("a vhost-user network", list("net").any(by_vhost)),
        ("a virtio-fs", any("fs")),
        ("a vhost-user device", any("generic_vhost_user")),
        ("a vfio-user device", any("user_devices")),
    ]
    .into_iter()
    .find_map(|(name, there)| there.then_some(name))
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
/// [`MemorySlotsError`].
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
    if bytes == 0 || (address | bytes | file_offset) % PAGE_BYTES != 0 {
        return bad("is empty or not made of whole pages");
    }
    if address.checked_add(bytes).is_none() || file_offset.checked_add(bytes).is_none() {
        return bad("goes past the end of addresses");
    }
    Ok(MemorySlot { slot, address, bytes, file_offset, pluggable: virtio_mem })
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
            r#"{"slot":1,"gpa":4294967296,"size":8192,"file_offset":4096,"zone_id":"mem0","virtio_mem":true},
               {"slot":0,"gpa":0,"size":4096,"file_offset":0,"virtio_mem":false}"#,
        );
        let slots = memory_slots(&text).expect("valid");
        assert_eq!(
            slots[0],
            MemorySlot { slot: 0, address: 0, bytes: 4096, file_offset: 0, pluggable: false }
        );
        let second =
            MemorySlot { slot: 1, address: 1 << 32, bytes: 8192, file_offset: 4096, pluggable: true };
        assert_eq!(slots[1], second);
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
        ] {
            let error = memory_slots(&config(&text)).expect_err("must be refused").to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
    }

    #[test]
    fn an_image_is_named_for_its_slots_in_one_way_only() {
        for name in ["memory", "memory-0", "memory-0-2-31"] {
            assert_eq!(StoredIn::parse(name).map(|s| s.to_string()).as_deref(), Some(name));
        }
        for name in ["", "mem", "memory-", "memory-00", "memory-2-0", "memory-1-1", "memory-+1", "memory0"] {
            assert_eq!(StoredIn::parse(name), None, "{name:?}");
        }
        assert_eq!(stored_in(vec![2, 0]), Some(StoredIn::Slots(vec![0, 2])));
        assert_eq!(stored_in((0..400).collect()), None, "too long for a name");
    }

    #[test]
    fn devices_that_other_processes_run_are_found() {
        let with = |devices: &str| format!(r#"{{"vm_config":{{{devices}}}}}"#);
        assert_eq!(foreign_device(with(r#""disks":[{"vhost_user":false}],"fs":null"#).as_bytes()), None);
        for devices in [r#""disks":[{},{"vhost_user":true}]"#, r#""fs":[{}]"#, r#""user_devices":[{}]"#] {
            assert!(foreign_device(with(devices).as_bytes()).is_some(), "{devices}");
        }
    }
}
