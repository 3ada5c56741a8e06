//! `dormouse serve-uffd`.

use std::collections::HashSet;

use dormouse_chunkstore::{Pages, Store, StoreOptions};
use dormouse_core::{ImageKind, Name, PageIndex};
use dormouse_firecracker::api::SnapshotKind;
use serde_json::Value;

use crate::scene::{
    Console, Machine, PATIENCE, Running, Scene, document, say, scene, wait_for_socket, wait_until,
};

/// Boots, snapshots, imports as `vm`, and leaves nothing but the store and the vmstate file.
pub(crate) fn parked(scene: &Scene) -> Console {
    park(scene, scene.boot(false))
}

/// Snapshots `machine`, imports it as `vm`, and leaves nothing but the store and the vmstate file.
pub(crate) fn park(scene: &Scene, machine: Machine) -> Console {
    machine.console.wait_for(".", 1);
    let api = machine.process.api(PATIENCE);
    let (state, memory) = (scene.text("vmstate"), scene.text("memory"));
    api.pause().unwrap();
    api.create_snapshot(SnapshotKind::Full, state.as_ref(), memory.as_ref()).unwrap();
    machine.process.kill().unwrap();
    let vmstate = format!("vmstate={state}");
    scene.done("home", &["import", "vm", "--memory", &memory, "--state", &vmstate]);
    std::fs::remove_file(memory).unwrap();
    std::fs::remove_file(state).unwrap();
    scene.done("home", &["export", "vm", "--state", &vmstate]);
    machine.console
}

/// What the memory of `vm` is made of.
struct Layout {
    /// Frames that hold its pages.
    frames: u64,
    /// Runs of pages, each in consecutive slots of one frame.
    runs: u64,
}

fn layout(scene: &Scene) -> Layout {
    let store = Store::open(&scene.text("store"), StoreOptions::default()).unwrap();
    let image = store.open_snapshot(&Name::new("vm").unwrap()).unwrap();
    let image = image.image(ImageKind::Memory, "memory").unwrap();
    let (mut page, mut runs, mut frames) = (0, 0, HashSet::new());
    while page < image.pages().0 {
        page += match image.locate(PageIndex(page)).unwrap() {
            Pages::Zero { pages } => pages,
            Pages::Stored { at, pages, .. } => {
                frames.insert((at.pack.id, at.frame.offset));
                runs += 1;
                pages
            }
        };
    }
    Layout { frames: frames.len() as u64, runs }
}

pub(crate) fn count(document: &Value, counter: &str) -> u64 {
    document["counters"][counter].as_u64().unwrap_or_else(|| panic!("no {counter} in {document}"))
}

/// Serves and wakes `vm` with these options, waits for verified passes, ends the VM, and gives the report.
pub(crate) fn wake(scene: &Scene, options: &[&str]) -> Value {
    let socket = scene.text("uffd.sock");
    let arguments = [&["serve-uffd", "vm", "--socket", &socket, "--once"], options].concat();
    let server = Running::start(scene.dormouse("elsewhere", &arguments));
    wait_for_socket(socket.as_ref());
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
    machine.console.wait_for(".", 3);
    machine.console.assert_no_wrong_page();
    machine.process.kill().unwrap();
    let report = document(&server.end());
    assert!(!scene.path("uffd.sock").exists(), "the socket goes with its server");
    report
}

#[test]
fn a_guest_wakes_from_the_store_and_finds_every_page_right() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let Layout { frames, runs } = layout(&scene);

    let report = wake(&scene, &[]);
    let fetches = count(&report, "fetches");
    // The background, which goes by pages, comes back to a frame whose pages lie far apart when it is kept no more: once
    // for each of its runs at most. A fault fetches one frame at most, whose other pages may be left to the background
    // on a busy machine.
    assert!(fetches <= runs + count(&report, "faults"), "{frames} frames in {runs} runs: {report}");
    assert!(fetches < crate::scene::PAGES / 8, "pages were fetched one by one: {report}");
    assert!(count(&report, "pages_copied") >= crate::scene::PAGES, "{report}");
    assert_eq!((count(&report, "retries"), count(&report, "poisoned")), (0, 0), "{report}");
    assert_eq!(report["killed_because"], Value::Null);

    let on_demand = wake(&scene, &["--no-prefetch"]);
    let fetches = count(&on_demand, "fetches");
    assert!(fetches <= count(&on_demand, "faults"), "a fault fetches its frame and no other: {on_demand}");
    assert!(fetches <= 2 * frames, "{frames} frames were fetched again and again: {on_demand}");
    assert_eq!(count(&on_demand, "prefetched_pages"), 0, "{on_demand}");
    assert!(count(&on_demand, "faults") > 0, "{on_demand}");
}

#[test]
fn one_server_wakes_clones_and_is_not_disturbed_by_nonsense() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let socket = scene.text("uffd.sock");
    let mut server = Running::start(scene.dormouse("home", &["serve-uffd", "vm", "--socket", &socket]));
    wait_for_socket(socket.as_ref());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    // One says nonsense and stays, one stops in the middle, one says nothing, one hangs up.
    let peers = [&b"GET / HTTP/1.1\r\n\r\n"[..], b"[{\"base_host", b""].map(|b| say(socket.as_ref(), b));
    drop(say(socket.as_ref(), b"[]"));
    let clones = ["one", "two"].map(|name| {
        let machine = scene.start(name);
        let api = machine.process.api(PATIENCE);
        api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
        machine
    });
    for clone in &clones {
        clone.console.wait_for(".", 2);
        clone.console.assert_no_wrong_page();
    }
    assert!(server.child().try_wait().unwrap().is_none(), "the server goes on");
    drop(peers);
    drop(clones);
    server.kill();
}

#[test]
fn the_memory_of_another_machine_is_refused_by_name() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    std::fs::write(scene.path("small"), vec![1; 1 << 20]).unwrap();
    scene.done("home", &["import", "small", "--memory", &scene.text("small")]);
    let socket = scene.text("uffd.sock");
    let mut command = scene.dormouse("home", &["serve-uffd", "small", "--socket", &socket]);
    command.stderr(std::fs::File::create(scene.path("stderr")).unwrap());
    let server = Running::start(command);
    wait_for_socket(socket.as_ref());
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap_err();
    let said = || std::fs::read_to_string(scene.path("stderr")).unwrap();
    wait_until("the refusal", || said().contains("load the vmstate of the same snapshot"));
    assert!(said().contains("was killed"), "a VM that would wait for ever is ended: {}", said());
    assert_eq!(machine.console.times("."), 0);
    server.kill();
}
