//! A disk attached over NBD, asked by QEMU's own clients.
use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use crate::home::{Home, image};

/// A server, killed with the test.
struct Attached(Child);

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Attached {
    /// Starts it and returns once it serves.
    fn start(home: &Home, args: &[&str]) -> Self {
        let mut all = vec!["attach", "a", "root", "--nbd", "nbd.sock"];
        all.extend(args);
        let mut child = home.command(&all).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let attached = Attached(child);
        assert!(line.starts_with("disk root ("), "{line:?}");
        attached
    }

    fn ask_to_end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

fn clients_are_here() -> bool {
    let here = ["qemu-img", "qemu-io"].iter().all(|it| Command::new(it).arg("--version").output().is_ok());
    if !here {
        assert!(std::env::var_os("DORMOUSE_REQUIRE_NBD").is_none_or(|it| it != "1"), "no qemu-img, qemu-io");
        dormouse_testkit::skipped!("no qemu-img or qemu-io (apt-get install qemu-utils)");
    }
    here
}

fn qemu(home: &Home, program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).current_dir(home.path("")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let ok = output.status.success() && !said.contains("failed");
    assert!(ok, "{program} {args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
}

fn compare(home: &Home, file: &str) {
    qemu(home, "qemu-img", &["compare", "-f", "raw", "-F", "raw", URI, file]);
}

const URI: &str = "nbd+unix:///root?socket=nbd.sock";

/// A home whose snapshot `a` has the disk `root` of the bytes returned.
fn home() -> (Home, Vec<u8>) {
    let (home, bytes) = (Home::new(), image(5, 700, 1536));
    fs::write(home.path("root.raw"), &bytes).unwrap();
    home.done(&["import", "a", "--disk", "root=root.raw"]);
    (home, bytes)
}

#[test]
fn flushed_writes_survive_a_killed_server() {
    if !clients_are_here() {
        return;
    }
    let (home, mut bytes) = home();
    let mut server = Attached::start(&home, &["--overlay", "overlay"]);
    compare(&home, "root.raw");
    let writes = ["write -P 0x5a 1536 9000", "write -z 65536 8192", "discard 131072 65536", "flush"];
    let mut args = vec!["-f", "raw"];
    writes.iter().for_each(|write| args.extend(["-c", write]));
    args.push(URI);
    qemu(&home, "qemu-io", &args);
    server.0.kill().unwrap();
    server.0.wait().unwrap();
    drop(server);
    bytes[1536..10_536].fill(0x5a);
    bytes[65_536..73_728].fill(0);
    bytes[131_072..196_608].fill(0);
    fs::write(home.path("expected.raw"), &bytes).unwrap();
    let server = Attached::start(&home, &["--overlay", "overlay"]);
    compare(&home, "expected.raw");
    server.ask_to_end();
    // The snapshot is as it was.
    let server = Attached::start(&home, &["--read-only"]);
    compare(&home, "root.raw");
    server.ask_to_end();
    assert!(!home.path("nbd.sock").exists());
}

#[test]
fn overlay_in_use_or_of_another_disk_is_refused() {
    let (home, _) = home();
    fs::write(home.path("other.raw"), image(6, 700, 1536)).unwrap();
    home.done(&["import", "b", "--disk", "root=other.raw"]);
    let server = Attached::start(&home, &["--overlay", "overlay"]);
    let attach = |name| ["attach", name, "root", "--nbd", "second.sock", "--overlay", "overlay"];
    assert_eq!(home.error(1, &attach("a"))["kind"], "busy");
    server.ask_to_end();
    assert_eq!(home.error(1, &attach("b"))["kind"], "conflict");
    let nowhere = home.error(2, &["attach", "a", "root", "--nbd", "second.sock"]);
    assert_eq!(nowhere["kind"], "usage");
    let no_disk = home.error(1, &["attach", "a", "data", "--nbd", "second.sock", "--read-only"]);
    assert_eq!(no_disk["kind"], "no_such_part");
}
