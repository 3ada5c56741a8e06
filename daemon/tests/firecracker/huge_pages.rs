//! A guest whose memory is of 2 MiB pages.

use serde_json::json;

use crate::scene::{MEMORY_MIB, PAGES, scene};
use crate::serve_uffd::{count, park, wake};

const NR: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Puts back the number of huge pages.
struct Reserved(u64);

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(NR, self.0.to_string());
    }
}

/// Huge pages for one guest at a time.
fn reserve() -> Option<Reserved> {
    let (before, free, wanted) = (number(NR), number(FREE), MEMORY_MIB / 2);
    let _ = std::fs::write(NR, (before + wanted.saturating_sub(free)).to_string());
    let reserved = Reserved(before);
    if number(FREE) < wanted {
        eprintln!(
            "SKIPPED: {wanted} huge pages needed, {} free; as root: echo {wanted} > {NR}",
            number(FREE)
        );
        return None;
    }
    Some(reserved)
}

#[test]
fn a_guest_of_huge_pages_wakes_with_whole_ones() {
    let Some(scene) = scene() else { return };
    let Some(_reserved) = reserve() else { return };
    let machine = scene.boot_as(|api| {
        let config = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": "2M"});
        api.put("/machine-config", &config).unwrap();
    });
    park(&scene, machine).assert_no_wrong_page();
    let huge_pages = MEMORY_MIB / 2;
    crate::huge_stream::comes_in_whole_pages(&scene);
    for options in [&["--no-prefetch"][..], &[]] {
        let report = wake(&scene, options);
        let installed = count(&report, "pages_copied") + count(&report, "zero_pages");
        assert!(count(&report, "faults") <= huge_pages, "{report}");
        assert_eq!(count(&report, "prefetched_pages") > 0, options.is_empty(), "{report}");
        // What the guest verifies is less than all of its memory, and each page of it comes as one.
        assert!(installed >= PAGES / 512 && installed <= huge_pages, "{report}");
        assert!(count(&report, "copy_ioctls") <= huge_pages + count(&report, "exists"), "{report}");
    }
}
