//! Who has the lease, said so that another process of the same host can see that it is dead.
//!
//! A process is told by its id and the time at which it began, within a kernel that was started once (its boot id), a
//! namespace of processes and one of times. All four must be the same for anybody to say of a process that it is dead; of all
//! others only their silence tells. Machines that were woken from one snapshot share them, so that one may take another's
//! process for dead: what makes it safe to take over from who was stopped (`gc/mod.rs`) makes that safe as well.

use std::{fmt, fs, io};

use rustix::process::{Pid, test_kill_process};

use crate::store::now_unix_ms;

/// A process that has, or had, the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// Host, process id, when it took the lease, boot id, namespaces, and when the process began. Older versions write the first
    /// three.
    parts: Vec<String>,
}

impl Owner {
    pub(super) fn this_process() -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let id = std::process::id();
        let mut parts = vec![host.trim().replace(['/', ' '], "-"), id.to_string(), now_unix_ms().to_string()];
        if let (Some(place), Some(seen)) = (Place::here(), Seen::of(id)) {
            parts.extend([place.boot, place.namespaces, seen.began]);
        }
        Owner { parts }
    }

    /// Of a lease's content: the owner, a space, and how often it was renewed.
    pub(super) fn decode(body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let owner = text.split_once(' ').map_or(&*text, |(owner, _)| owner);
        Owner { parts: owner.split('/').map(str::to_owned).collect() }
    }

    /// Whether it is certain that it does nothing any more.
    pub(super) fn is_dead(&self) -> bool {
        Place::here().is_some_and(|here| self.is_dead_in(&here))
    }

    fn is_dead_in(&self, here: &Place) -> bool {
        let [_, id, _, boot, namespaces, began] = &self.parts[..] else { return false };
        let Ok(id) = id.parse::<u32>() else { return false };
        let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) else { return false };
        if *boot != here.boot || *namespaces != here.namespaces {
            return false;
        }
        match test_kill_process(pid) {
            Err(rustix::io::Errno::SRCH) => true,
            // There is one of this id. If it began at another time it is not the same. What cannot be seen is not dead.
            _ => Seen::of(id).is_some_and(|now| now.is_over || now.began != *began),
        }
    }

    /// As a person wants to know it.
    pub(super) fn for_people(&self) -> String {
        match &self.parts[..] {
            [host, id, ..] => format!("process {id} on {host}"),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts.join("/"))
    }
}

/// Where ids of processes and the times at which they began mean the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    boot: String,
    namespaces: String,
}

impl Place {
    /// `None` where it cannot be told.
    fn here() -> Option<Self> {
        // A `/proc` of another namespace tells of other processes.
        let me = fs::read_link("/proc/self").ok()?;
        if me.to_str() != Some(&std::process::id().to_string()) {
            return None;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        let of = |kind: &str| match fs::read_link(format!("/proc/self/ns/{kind}")) {
            Ok(link) => Some(link.to_string_lossy().replace('/', "-")),
            // Kernels without such namespaces have one of all.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Some(String::new()),
            Err(_) => None,
        };
        let namespaces = format!("{},{}", of("pid")?, of("time")?);
        (!boot.is_empty()).then_some(Place { boot, namespaces })
    }
}

/// What the kernel says of a process.
struct Seen {
    /// When it began, in ticks since the machine did.
    began: String,
    /// It has ended, and its parent has not looked yet.
    is_over: bool,
}

impl Seen {
    fn of(id: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?)
    }

    /// The name, in parentheses, may hold anything. What follows is the state; of the fields in all, the 20th says how many
    /// threads there are and the 22nd when it began.
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, threads, began) = (fields.first()?, fields.get(17)?, fields.get(19)?);
        // A first thread that ended alone looks the same but for the number of those that go on.
        let is_over = matches!(*state, "Z" | "X") && threads.parse::<u64>().is_ok_and(|n| n < 2);
        Some(Seen { began: (*began).to_owned(), is_over })
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// As a process of this host would write it that has this id and began when this says.
    fn owner(id: u32, began: &str) -> Owner {
        let mut owner = Owner::this_process();
        assert_eq!(owner.parts.len(), 6, "this host tells processes apart: {owner}");
        (owner.parts[1], owner.parts[5]) = (id.to_string(), began.to_owned());
        owner
    }

    #[test]
    fn a_process_that_runs_is_not_dead() {
        let me = Owner::this_process();
        assert!(!me.is_dead());
        assert_eq!(Owner::decode(format!("{me} 17").as_bytes()), me);
    }

    #[test]
    fn a_process_is_dead_before_and_after_it_is_waited_for() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let owner = owner(child.id(), &Seen::of(child.id()).unwrap().began);
        assert!(!owner.is_dead());
        drop(child.stdin.take());
        // Ended, and nobody has waited for it.
        let pid = Pid::from_child(&child);
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).unwrap();
        assert!(owner.is_dead());
        child.wait().unwrap();
        assert!(owner.is_dead());
    }

    #[test]
    fn another_process_of_the_same_id_is_not_the_one_that_died() {
        assert!(owner(std::process::id(), "1").is_dead());
    }

    #[test]
    fn of_other_hosts_and_namespaces_nothing_is_known() {
        let dead = owner(std::process::id(), "1");
        for part in [3, 4] {
            let mut elsewhere = dead.clone();
            elsewhere.parts[part].push('0');
            assert!(!elsewhere.is_dead(), "{elsewhere}");
        }
        let mut older = dead.clone();
        older.parts.truncate(3);
        assert!(!older.is_dead(), "{older}");
        assert!(!Owner::decode(b"nonsense \xff/1/2/3/4/5/6").is_dead());
    }

    #[test]
    fn a_first_thread_that_ended_alone_is_no_end() {
        let stat = |state: &str, threads: u32| {
            format!("7 (a) Z (b)) {state} {} {threads} 0 4711 8", ["0"; 16].join(" "))
        };
        assert!(Seen::parse(&stat("Z", 1)).unwrap().is_over);
        assert!(!Seen::parse(&stat("Z", 2)).unwrap().is_over);
        assert!(!Seen::parse(&stat("S", 1)).unwrap().is_over);
        assert_eq!(Seen::parse(&stat("S", 1)).unwrap().began, "4711");
    }
}
