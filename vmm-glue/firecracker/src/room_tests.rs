use super::*;

const UNIFIED: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

fn paths(membership: &str, mountinfo: &str) -> Vec<String> {
    groups(membership, mountinfo).iter().map(|path| path.display().to_string()).collect()
}

#[test]
fn groups_are_found_from_own_to_mounted() {
    let own = paths("0::/machines/vm-1\n", UNIFIED);
    assert_eq!(own, ["/sys/fs/cgroup/machines/vm-1", "/sys/fs/cgroup/machines", "/sys/fs/cgroup"]);
    let hybrid = paths("5:cpu,cpuacct:/x\n4:memory:/machines\n0::/\n", HYBRID);
    let memory = ["/sys/fs/cgroup/memory/machines", "/sys/fs/cgroup/memory"];
    assert_eq!(hybrid, [memory[0], memory[1], "/sys/fs/cgroup/unified"]);
    // Inside a container, of a group beside its own.
    assert_eq!(paths("0::/../other\n", UNIFIED), ["/sys/fs/cgroup"]);
    let below = UNIFIED.replace("0:28 / ", "0:28 /docker/7 ");
    assert_eq!(paths("0::/docker/7/a\n", &below), ["/sys/fs/cgroup/a", "/sys/fs/cgroup"]);
    assert!(paths("", UNIFIED).is_empty() && paths("nonsense", "nonsense").is_empty());
}

fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    for (name, text) in files {
        fs::write(directory.path().join(name), text).expect("write");
    }
    directory
}

#[test]
fn room_counts_what_a_group_can_give_back() {
    let stat = "anon 500\ninactive_file 30\nactive_file 7\nshmem 100\nslab_reclaimable 3\n";
    let current = ("memory.current", "700\n");
    let limited =
        group(&[("memory.max", "1000\n"), current, ("memory.stat", stat), ("memory.swap.max", "0\n")]);
    let room = room_of(limited.path(), 1 << 20).expect("a limit");
    assert_eq!(room.bytes, 1000 - (700 - 40));
    assert!(room.limit.ends_with("memory.max of 1000 bytes"), "{}", room.limit);
    let unlimited = group(&[("memory.max", "max\n"), current]);
    assert_eq!(room_of(unlimited.path(), 0), None);
    let swaps = group(&[("memory.max", "1000\n"), current, ("memory.swap.max", "max\n")]);
    assert_eq!(room_of(swaps.path(), 50).map(|room| room.bytes), Some(350));
    let full = group(&[("memory.max", "1000\n"), ("memory.current", "1200\n")]);
    assert_eq!(room_of(full.path(), 0).map(|room| room.bytes), Some(0));
}

#[test]
fn room_of_version_1_groups_is_found() {
    let usage = ("memory.usage_in_bytes", "700\n");
    let limited = group(&[("memory.limit_in_bytes", "1000\n"), usage]);
    assert_eq!(room_of(limited.path(), 0).map(|room| room.bytes), Some(300));
    let with_swap = [("memory.memsw.limit_in_bytes", "1000\n"), ("memory.memsw.usage_in_bytes", "700\n")];
    let both = group(&[&[("memory.limit_in_bytes", "1000\n"), usage], &with_swap[..]].concat());
    assert_eq!(room_of(both.path(), 1 << 30).map(|room| room.bytes), Some(300));
    let unlimited = group(&[("memory.limit_in_bytes", "9223372036854771712\n"), usage]);
    assert_eq!(room_of(unlimited.path(), 0), None);
}

#[test]
fn file_sizes_are_read_from_soft_limits() {
    let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                  Max cpu time              unlimited            unlimited            seconds   \n\
                  Max file size             33554432             unlimited            bytes     \n";
    assert_eq!(soft_limit(limits, "Max file size"), Some(33554432));
    assert_eq!(soft_limit(limits, "Max cpu time"), None);
}

#[test]
fn this_process_has_room_and_written_memory() {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    assert!(own_room().is_some_and(|room| room.bytes > 0));
    assert!(written_bytes_max(pid).is_some_and(|bytes| bytes > 0));
}
