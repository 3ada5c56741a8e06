//! `dormouse demo`, driven as a person would: no time is asserted on, only what the machine found and what is left.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

const REFUSED: &str = "userfaultfd is not permitted";

fn required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|v| v == "1")
}

fn have_kvm() -> bool {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    assert!(
        kvm.is_ok() || !required("DORMOUSE_REQUIRE_KVM"),
        "DORMOUSE_REQUIRE_KVM=1, but /dev/kvm: {kvm:?}"
    );
    if let Err(why) = &kvm {
        dormouse_testkit::skipped!("/dev/kvm cannot be opened: {why}");
    }
    kvm.is_ok()
}

/// The command, in a home and with temporary files of its own.
fn demo(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.arg("demo").args(args).env("HOME", home).env("TMPDIR", home).current_dir(home);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DORMOUSE_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The document; `None`, loudly, where userfaultfd is not permitted, which the demo has to say.
fn document(ran: &Output) -> Option<Value> {
    let (stdout, stderr) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let document: Value =
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout:?} {stderr}"));
    if stderr.contains(REFUSED) {
        assert!(!required("DORMOUSE_REQUIRE_UFFD"), "DORMOUSE_REQUIRE_UFFD=1, but {stderr}");
        assert_eq!(ran.status.code(), Some(1));
        assert!(stderr.contains("vm.unprivileged_userfaultfd=1"), "says how to permit it: {stderr}");
        dormouse_testkit::skipped!("{stderr}");
        return None;
    }
    assert!(ran.status.success(), "{stderr}");
    Some(document)
}

fn runs_and_is_right(guest: &str) {
    let home = tempfile::tempdir().unwrap();
    let args = ["--json", "--runs", "3", "--pages", "1024", "--guest", guest, "--price", "1000"];
    let ran = demo(home.path(), &args).output().unwrap();
    let Some(document) = document(&ran) else { return };
    assert_eq!(document["guest"], guest);
    let (snapshot, resume, pages) = (&document["snapshot"], &document["resume"], &document["pages"]);

    let bytes = |field: &str| snapshot[field].as_u64().unwrap_or_else(|| panic!("{field}: {snapshot}"));
    assert_eq!(bytes("logical_bytes"), 128 << 20);
    assert!(bytes("nonzero_bytes") >= 1024 * 4096 && bytes("nonzero_bytes") <= bytes("logical_bytes"));
    assert!(bytes("stored_bytes") > 0 && bytes("stored_bytes") < bytes("nonzero_bytes"));
    let dollars = snapshot["dollars_per_month"].as_f64().expect("a price");
    assert!((dollars - bytes("stored_bytes") as f64 / 1e9 * 1000.0).abs() < 1e-9);

    assert_eq!(resume["runs"], 3);
    let mut before = 0.0;
    for phase in ["open", "handshake", "first_instruction", "first_answer", "first_full_verified_pass"] {
        let p50 = resume["phases"][phase]["p50_ms"].as_f64().unwrap_or_else(|| panic!("{phase}: {resume}"));
        let p99 = resume["phases"][phase]["p99_ms"].as_f64().unwrap_or_else(|| panic!("{phase}: {resume}"));
        assert!(p50 >= before && p99 >= p50, "{phase} comes after what comes before: {resume}");
        before = p50;
    }
    assert_eq!(resume["p50_ms"], resume["phases"]["first_answer"]["p50_ms"]);
    assert_eq!(resume["p99_ms"], resume["phases"]["first_answer"]["p99_ms"]);

    assert_eq!(pages["wrong"], 0);
    let brought = pages["faulted"].as_u64().unwrap() + pages["prefetched"].as_u64().unwrap();
    assert!(brought >= 3 * 256, "an answer alone reads 256 pages: {pages}");
    assert!(pages["prefetched"].as_u64().unwrap() > 0, "the working set was known: {pages}");
    assert_left_nothing(home.path());
    assert!(!home.path().join(".cache").exists(), "a cache for a store that is gone");
}

fn left(home: &Path) -> Vec<String> {
    let names = fs::read_dir(home).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|n| n.starts_with("dormouse-demo-")).collect()
}

fn assert_left_nothing(home: &Path) {
    for _ in 0..200 {
        if left(home).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("the demo left {:?}", left(home));
}

#[test]
fn a_virtual_machine_wakes_with_every_page_right() {
    if have_kvm() {
        runs_and_is_right("kvm");
    }
}

#[test]
fn a_process_does_in_place_of_a_virtual_machine() {
    runs_and_is_right("process");
}

#[test]
fn the_text_says_what_the_document_says() {
    let home = tempfile::tempdir().unwrap();
    let ran = demo(home.path(), &["--runs", "1", "--pages", "256", "--guest", "process"]).output().unwrap();
    let (text, stderr) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    if stderr.contains(REFUSED) {
        return;
    }
    for word in
        ["logical", "non-zero", "stored", "a month", "handshake", "p99", "prefetched", "wrong pages:  0"]
    {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
}

#[test]
fn a_store_of_ones_own_is_used_and_the_machine_is_taken_out_of_it() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("store");
    let store = store.to_str().unwrap();
    let args = ["--json", "--runs", "1", "--pages", "256", "--guest", "process", "--store", store];
    let ran = demo(home.path(), &args).output().unwrap();
    if document(&ran).is_none() {
        return;
    }
    let listed =
        Command::new(env!("CARGO_BIN_EXE_dormouse")).args(["ls", "--json", "--store", store]).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    assert!(!listed.contains("demo-"), "{listed}");
}

#[test]
fn a_demo_that_is_killed_leaves_no_files_and_no_processes() {
    let home = tempfile::tempdir().unwrap();
    let mut command = demo(home.path(), &["--runs", "1000", "--pages", "256", "--guest", "process"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for _ in 0..400 {
        let packs = left(home.path()).iter().any(|d| home.path().join(d).join("store/plain/packs").is_dir());
        if packs || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_left_nothing(home.path());
    for _ in 0..200 {
        if processes_of(home.path()).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("the demo left {:?}", processes_of(home.path()));
}

/// Processes whose arguments name something in `home`, as those of a demo do.
fn processes_of(home: &Path) -> Vec<String> {
    let home = home.to_str().unwrap();
    let lines = fs::read_dir("/proc").unwrap().filter_map(|process| {
        let line = fs::read(process.ok()?.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(home)).collect()
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let home = tempfile::tempdir().unwrap();
    for (args, reason) in [
        (&["--pages", "7"][..], "multiple of 8"),
        (&["--store", "memory://", "--guest", "process"][..], "memory://"),
        (&["--runs", "0"][..], "0"),
    ] {
        let ran = demo(home.path(), args).output().unwrap();
        let stderr = String::from_utf8_lossy(&ran.stderr);
        if stderr.contains(REFUSED) {
            continue;
        }
        assert_eq!(ran.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(reason), "{args:?}: {stderr}");
    }
}
