//! A guest whose memory is of 2 MiB pages.

use serde_json::json;

use crate::scene::{MEMORY_MIB, Machine, PAGES, Scene, scene, wait_until};
use crate::serve_uffd::{count, park, wake};
use crate::served::{Mortal, Served};

const NR: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Puts back the number of huge pages. They are one pool: whoever else wants some waits.
struct Reserved(u64, #[expect(dead_code, reason = "locked until dropped")] std::fs::File);

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(NR, self.0.to_string());
    }
}

/// Huge pages for one guest at a time.
fn reserve() -> Option<Reserved> {
    let pool = std::fs::File::open(NR).ok()?;
    pool.lock().ok()?;
    let (before, free, wanted) = (number(NR), number(FREE), MEMORY_MIB / 2);
    let _ = std::fs::write(NR, (before + wanted.saturating_sub(free)).to_string());
    let reserved = Reserved(before, pool);
    if number(FREE) < wanted {
        dormouse_testkit::skipped!(
            "{wanted} huge pages needed, {} free; as root: echo {wanted} > {NR}",
            number(FREE)
        );
        return None;
    }
    Some(reserved)
}

fn boot(scene: &Scene) -> Machine {
    scene.boot_as(|api| {
        let config = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": "2M"});
        api.put("/machine-config", &config).unwrap();
    })
}

#[test]
fn a_guest_of_huge_pages_wakes_with_whole_ones() {
    let Some(scene) = scene() else { return };
    let Some(_reserved) = reserve() else { return };
    park(&scene, boot(&scene)).assert_no_wrong_page();
    let huge_pages = MEMORY_MIB / 2;
    crate::huge_stream::comes_in_whole_pages(&scene);
    for options in [&["--no-prefetch"][..], &[]] {
        let report = wake(&scene, options);
        let installed = count(&report, "pages_copied") + count(&report, "zero_pages");
        assert!(crate::huge_stream::faulted(&report) <= huge_pages, "{report}");
        assert_eq!(count(&report, "prefetched_pages") > 0, options.is_empty(), "{report}");
        // What the guest verifies is less than all of its memory, and each page of it comes as one.
        assert!(installed >= PAGES / 512 && installed <= huge_pages, "{report}");
        assert!(count(&report, "copy_ioctls") <= huge_pages + count(&report, "exists"), "{report}");
    }
}

#[test]
fn a_guest_of_huge_pages_outlives_its_daemon_and_sleeps() {
    let Some(scene) = scene() else { return };
    let Some(_reserved) = reserve() else { return };
    park(&scene, boot(&scene)).assert_no_wrong_page();
    let mut daemon = Served::start(&scene, &[]);
    for (number, prefetch) in [false, true].into_iter().enumerate() {
        let id = format!("vm-{number}");
        let (vm, console) = daemon.wake(&scene, &id, json!({"prefetch": prefetch}));
        let _end = Mortal::of(&vm);
        for kill in 0..6 {
            // Now in the middle of its first pass, now at once.
            std::thread::sleep(std::time::Duration::from_millis(kill % 3 * 5));
            daemon.process.kill();
            daemon = Served::start(&scene, &[]);
            wait_until("the VM", || daemon.get(&format!("/v1/vms/{id}"))["state"] == "running");
        }
        console.goes_on(2);
        let standby = daemon.post(&format!("/v1/vms/{id}/standby"), &json!({"name": id}));
        assert_eq!(standby["ended"], true, "{standby}");
        console.assert_no_wrong_page();
        let again = format!("{id}-again");
        let (vm, console) = daemon.wake(&scene, &again, json!({"snapshot": id}));
        let _end = Mortal::of(&vm);
        console.wait_for(".", 2);
        console.assert_no_wrong_page();
        daemon.post(&format!("/v1/vms/{again}/stop"), &json!({}));
    }
}
