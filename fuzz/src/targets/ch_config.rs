//! Cloud Hypervisor's configuration: memory slots, devices of other processes; and names of images.
use dormouse_cloud_hypervisor::memory::{self, SLOTS_MAX, StoredIn};

pub(crate) fn check(bytes: &[u8]) {
    let _ = memory::foreign_device(bytes);
    // As it came, and as the slots of a configuration that is sound otherwise.
    let around = [&b"{\"memory_manager_data\":{\"guest_ram_mappings\":["[..], bytes, &b"]}}"[..]].concat();
    for config in [bytes, &around] {
        let Ok(slots) = memory::memory_slots(config) else { continue };
        assert!((1..=SLOTS_MAX).contains(&slots.len()));
        for slot in &slots {
            assert!(slot.bytes > 0 && (slot.address | slot.bytes | slot.file_offset) % 4096 == 0);
            assert!(slot.file_offset.checked_add(slot.bytes).is_some());
        }
        assert!(slots.windows(2).all(|p| p[0].address + p[0].bytes <= p[1].address));
        if let Some(stored) = memory::stored_in(slots.iter().map(|s| s.slot).collect()) {
            assert_eq!(StoredIn::parse(&stored.to_string()), Some(stored));
        }
    }
    if let Some((name, stored)) = std::str::from_utf8(bytes).ok().and_then(|n| Some((n, StoredIn::parse(n)?)))
    {
        assert_eq!(stored.to_string(), name);
    }
}
