//! Somebody else calls the API: the commands only speak the protocol.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::peer::{OK, Receive, Vm, receive_at};
use super::vmm::{PATIENCE, SEED, SLOTS, Scene, document, scene};

/// Puts a VM of this process on standby as `name`.
fn sleep(scene: &Scene, name: &str) {
    let socket = scene.text("standby.sock");
    let command = scene.dormouse("home", &["standby", "cloud-hypervisor", name, "--socket", &socket]).spawn();
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) => assert!(Instant::now() < deadline, "nobody listens"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let file = std::fs::metadata(&socket).unwrap();
    assert_eq!((file.permissions().mode() & 0o777, file.uid()), (0o600, rustix::process::geteuid().as_raw()));
    assert_eq!(Vm::new(&SLOTS, SEED).send(&stream, false).unwrap(), OK);
    let output = command.unwrap().wait_with_output().unwrap();
    let slept = document(&output);
    // The VMM is this process, which has not ended: as one that was told to keep its VM.
    assert_eq!((&slept["ended"], &slept["was_running"]), (&false.into(), &false.into()));
    assert!(!scene.path("standby.sock").exists(), "the socket is gone with the command");
}

#[test]
fn a_vm_sent_by_somebody_else_sleeps_and_is_received_by_somebody_else() {
    let Some(scene) = scene() else { return };
    sleep(&scene, "vm");
    for (name, postcopy, more) in [("on-demand", true, None), ("eager", false, Some("--eager"))] {
        let socket = scene.path(name);
        let peer = receive_at(&socket, Receive { postcopy, prefault: true });
        let args = ["resume", "cloud-hypervisor", "vm", "--paused", "--socket", socket.to_str().unwrap()];
        let command = scene.dormouse("home", &[&args[..], more.as_slice()].concat()).spawn().unwrap();
        let awake = peer.join().unwrap().unwrap();
        assert!(!awake.ran, "it stays paused");
        awake.verify(SEED);
        let output = command.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(document(&output)["memory"], name);
    }
}

#[test]
fn a_vmm_that_was_not_told_to_ask_for_pages_is_refused() {
    let Some(scene) = scene() else { return };
    sleep(&scene, "vm");
    let socket = scene.path("resume.sock");
    let peer = receive_at(&socket, Receive { postcopy: false, prefault: false });
    let said = scene.fails(&["resume", "cloud-hypervisor", "vm", "--socket", socket.to_str().unwrap()]);
    assert!(said.contains("memory_mode=postcopy"), "{said}");
    assert!(peer.join().unwrap().is_err(), "its guest has not run");
}

#[test]
fn a_daemon_killed_under_a_vm_ends_the_vm_and_gives_it_no_wrong_page() {
    let Some(scene) = scene() else { return };
    sleep(&scene, "vm");
    let socket = scene.path("resume.sock");
    let peer = receive_at(&socket, Receive { postcopy: true, prefault: false });
    let args = ["resume", "cloud-hypervisor", "vm", "--no-prefetch", "--socket", socket.to_str().unwrap()];
    let mut command = scene.dormouse("home", &args).spawn().unwrap();
    let awake = peer.join().unwrap().unwrap();
    assert_eq!(awake.load(8), super::peer::word(8, SEED));
    command.kill().unwrap();
    command.wait().unwrap();
    // The next page: the VMM's handler gives up, on which Cloud Hypervisor ends.
    let awake = std::sync::Arc::new(awake);
    let vcpu = awake.clone();
    let touched = std::thread::spawn(move || vcpu.load(3 << 20));
    let deadline = Instant::now() + PATIENCE;
    while !awake.handler_ended() {
        assert!(Instant::now() < deadline, "the VMM waits for ever");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!touched.is_finished(), "the guest was given nothing");
}

#[test]
fn nobody_is_waited_for_for_ever() {
    let Some(scene) = scene() else { return };
    let said =
        scene.fails(&["standby", "cloud-hypervisor", "vm", "--socket", &scene.text("s"), "--wait", "0s"]);
    assert!(said.contains("send-migration"), "{said}");
    sleep(&scene, "vm");
    let said =
        scene.fails(&["resume", "cloud-hypervisor", "vm", "--socket", &scene.text("r"), "--wait", "0s"]);
    assert!(said.contains("receive-migration"), "{said}");
}
