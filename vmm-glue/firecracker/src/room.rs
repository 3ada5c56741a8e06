//! The limits that a capture runs into: memory that a process may still be charged for, and how long its files may be.
//!
//! Memory of a file is charged to the control group of whoever writes a page first. A group that runs full kills a process
//! of its own; a file beyond `RLIMIT_FSIZE` ends whoever writes it. Either would take the guest along, so both are read
//! before it is paused.

use std::fs;
use std::path::{Path, PathBuf};

/// How much more memory may be charged, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// So many bytes.
    pub bytes: u64,
    /// The limit, for people.
    pub limit: String,
}

/// The control groups that memory of a process is charged to, its own first.
#[derive(Clone, Debug, Default)]
pub struct Groups(Vec<PathBuf>);

impl Groups {
    /// Those of process `pid`, as far as they are seen from here.
    pub fn of(pid: i32) -> Self {
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        Groups(groups(&read(format!("/proc/{pid}/cgroup")), &read("/proc/self/mountinfo".into())))
    }

    /// What the tightest of them leaves; `None` without a limit.
    pub fn room(&self) -> Option<Room> {
        let swap_free = meminfo("SwapFree:").unwrap_or(0);
        self.0.iter().filter_map(|group| room_of(group, swap_free)).min_by_key(|room| room.bytes)
    }

    /// How many processes the kernel has killed in the group itself, as it was full.
    pub fn killed(&self) -> u64 {
        let count = |(file, of)| {
            let text = fs::read_to_string(self.0.first()?.join(file)).ok()?;
            text.lines().find_map(|line| line.strip_prefix(of)?.strip_prefix(' ')?.trim().parse().ok())
        };
        [("memory.events", "oom_kill"), ("memory.oom_control", "oom_kill")]
            .into_iter()
            .find_map(count)
            .unwrap_or(0)
    }
}

/// What this process may still be charged for: by its control groups, or as the host has no more.
pub fn own_room() -> Option<Room> {
    let available = meminfo("MemAvailable:").map(|bytes| Room {
        bytes: bytes.saturating_add(meminfo("SwapFree:").unwrap_or(0)),
        limit: "this host's memory".into(),
    });
    let own = Groups::of(rustix::process::getpid().as_raw_nonzero().get()).room();
    available.into_iter().chain(own).min_by_key(|room| room.bytes)
}

/// How long files of process `pid` may be (`RLIMIT_FSIZE`); `None` without a limit.
pub fn file_bytes_max(pid: i32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    soft_limit(&limits, "Max file size")
}

/// Memory of process `pid` that a difference may have to hold: what was written is in memory, or swapped out.
pub fn written_bytes_max(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kinds = ["RssAnon:", "RssShmem:", "VmSwap:", "HugetlbPages:"];
    Some(kinds.iter().filter_map(|kind| kib(&status, kind)).sum())
}

fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

fn meminfo(field: &str) -> Option<u64> {
    kib(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

/// The field of a file of `/proc` that counts in KiB, in bytes.
fn kib(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(value.split_whitespace().next()?.parse::<u64>().ok()?.saturating_mul(1024))
}

/// The directories of the control groups that `membership` (`/proc/PID/cgroup`) names, and of those above them, by the
/// mounts in `mountinfo`.
fn groups(membership: &str, mountinfo: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|c| c == "memory") {
            continue;
        }
        let Some((root, mounted)) = mountinfo.lines().find_map(|line| mount_of(line, unified)) else {
            continue;
        };
        // A group outside of what is mounted here is not to be seen; what is mounted lies above it.
        let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let below = if below.components().any(|c| c == std::path::Component::ParentDir) {
            Path::new("")
        } else {
            below
        };
        let own: PathBuf = Path::new(mounted).join(below).components().collect();
        found.extend(own.ancestors().take_while(|group| group.starts_with(mounted)).map(Path::to_owned));
    }
    found
}

/// Root and place of the mount in a line of `mountinfo`, if it is one of control groups that count memory.
fn mount_of(line: &str, unified: bool) -> Option<(&str, &str)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, mounted) = (mount.next()?, mount.next()?);
    let mut system = system.split(' ');
    let (kind, options) = (system.next()?, system.nth(1).unwrap_or_default());
    let is_it = match unified {
        true => kind == "cgroup2",
        false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    is_it.then_some((root, mounted))
}

/// What one group leaves. What it holds of files on disks it can give back, and what may be swapped makes room.
fn room_of(group: &Path, swap_free: u64) -> Option<Room> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    let count = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    let sum = |fields: &[&str]| -> u64 {
        let of = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            fields.contains(&name).then(|| value.trim().parse::<u64>().ok())?
        };
        stat.lines().filter_map(of).sum()
    };
    let left = |most: u64, now: u64, given_back: u64| most.saturating_sub(now.saturating_sub(given_back));
    let (most, file, bytes) = match (count("memory.max"), count("memory.limit_in_bytes")) {
        (Some(most), _) => {
            let given_back = sum(&["inactive_file", "active_file", "slab_reclaimable"]);
            let swap_now = count("memory.swap.current").unwrap_or(0);
            let swap = count("memory.swap.max")
                .map_or(swap_free, |most| most.saturating_sub(swap_now).min(swap_free));
            let bytes = left(most, count("memory.current")?, given_back).saturating_add(swap);
            (most, "memory.max", bytes)
        }
        (None, Some(most)) => {
            let given_back = sum(&["total_inactive_file", "total_active_file"]);
            let bytes = left(most, count("memory.usage_in_bytes")?, given_back).saturating_add(swap_free);
            let both = count("memory.memsw.limit_in_bytes").zip(count("memory.memsw.usage_in_bytes"));
            let both = both.map_or(u64::MAX, |(most, now)| left(most, now, given_back));
            (most, "memory.limit_in_bytes", bytes.min(both))
        }
        (None, None) => return None,
    };
    // How version 1 says that there is none.
    const NO_LIMIT_FROM: u64 = 1 << 62;
    let limit = format!("{} of {most} bytes", group.join(file).display());
    (most < NO_LIMIT_FROM).then_some(Room { bytes, limit })
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;
