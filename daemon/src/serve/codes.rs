//! Every way a request can fail: its code, its HTTP status, and what to do about it.

/// A code, the status it is sent with, and a hint.
type Code = (&'static str, u16, &'static str);

/// In the order of docs/SERVICE.md.
pub(crate) const CODES: &[Code] = &[
    // What was asked.
    ("bad_request", 400, "GET /openapi.json says what a request looks like"),
    ("usage", 400, "ask differently; the message says how"),
    ("no_such_route", 404, "GET /openapi.json lists the routes"),
    ("no_such_method", 405, "the Allow header lists the methods"),
    ("too_slow", 408, "send the request in one go"),
    ("too_large", 413, "no request needs so many bytes"),
    // What it was asked of.
    ("no_such_vm", 404, "GET /v1/vms lists the VMs"),
    ("no_such_listener", 404, "GET /v1/listeners lists the listeners"),
    ("no_such_snapshot", 404, "GET /v1/snapshots lists the snapshots"),
    ("nothing_stored", 404, "see that the store's address is right; the first snapshot makes the store"),
    ("no_such_part", 404, "the snapshot was made without it: import it again with it"),
    ("exists", 409, "choose another id or name, or end or replace what has it"),
    ("busy", 409, "wait until what is under way has ended; of a VM, GET names it"),
    ("not_served", 409, "the VM's memory is not served here: it has ended, was detached, or is another's"),
    ("stopping", 503, "the daemon is about to end; ask again once it has been started again"),
    // VMMs.
    ("vmm", 502, "look at the VMM's console and log, and whether its API socket answers"),
    ("vm", 500, "look at the daemon's log"),
    ("vm_refused", 409, "load the device state of the snapshot that is served"),
    ("vm_killed", 500, "`dormouse verify` says what is damaged; resume the snapshot again once it is mended"),
    ("socket", 409, "choose another path, or end what listens there"),
    ("tracking", 500, "give the runtime directory back to the daemon's user"),
    ("memory", 507, "free memory on this host"),
    ("threads", 503, "raise the limit on threads (TasksMax=, ulimit -u)"),
    // The store.
    ("unavailable", 503, "the store did not answer: ask again"),
    ("conflict", 409, "somebody else was first: look, then ask again"),
    ("lost_race", 409, "somebody else was first: look, then ask again"),
    ("no_such_store", 500, "make the bucket or container, or start the daemon with the right URL"),
    ("unsupported", 500, "use a store that honours the conditions of writes"),
    ("config", 500, "start the daemon with the configuration that the message names"),
    ("missing", 500, "`dormouse verify` says which snapshots it hurts"),
    ("damaged", 500, "`dormouse verify` says which snapshots it hurts"),
    ("wrong_key", 500, "start the daemon with the key of these snapshots"),
    ("key_missing", 500, "start the daemon with the key of these snapshots"),
    ("key", 500, "give the daemon a key it can read"),
    ("too_new", 500, "upgrade the daemon"),
    ("denied", 403, "permit it, to the daemon's user or credentials"),
    (
        "archived",
        403,
        "restore the object from the archive tier, and let no lifecycle rule move objects there",
    ),
    ("full", 507, "make room"),
    ("file", 500, "see that the daemon's user may use that path"),
    ("changed", 409, "stop what writes to that file while its machine stands still, then ask again"),
    ("bug", 500, "please report it, with the message"),
];

/// Status and hint of `code`.
pub(crate) fn lookup(code: &str) -> (u16, &'static str) {
    CODES.iter().find(|(known, ..)| *known == code).map_or((500, ""), |(_, status, hint)| (*status, *hint))
}

/// The same code as one that lives as long as this program; `bug` if it is not known.
pub(crate) fn known(code: &str) -> &'static str {
    CODES.iter().find(|(known, ..)| *known == code).map_or("bug", |(known, ..)| known)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_code_is_there_once_and_has_a_status_of_failure_and_a_hint() {
        let mut seen = HashSet::new();
        for (code, status, hint) in CODES {
            assert!(seen.insert(code), "{code} is there twice");
            assert!((400..600).contains(status), "{code}");
            assert!(!hint.is_empty(), "{code}");
        }
    }
}
