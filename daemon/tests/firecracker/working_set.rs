//! Resume streams and working sets with real Firecracker: asserted by counts.

use dormouse_restore::WORKING_SET_PAGES_MAX;
use dormouse_wake::{Record, predict};
use serde_json::Value;

use crate::generations;
use crate::scene::{PAGES, PATIENCE, Running, Scene, document, scene, wait_for_socket, wait_until};
use crate::serve_uffd::{count, parked};

/// Pages of the guest beside its pattern: code, page tables, stack, devices. And the loads Firecracker makes.
const OTHER_PAGES: u64 = 64;

/// Serves `vm`, lets the guest run once `ready` is said on standard error, and gives the report of its passes.
pub(crate) fn wake(scene: &Scene, host: &str, options: &[&str], ready: Option<&str>) -> Value {
    let socket = scene.text("uffd.sock");
    let arguments = [&["serve-uffd", "vm", "--socket", &socket, "--once", "-v"], options].concat();
    let mut command = scene.dormouse(host, &arguments);
    command.stderr(std::fs::File::create(scene.path("stderr")).unwrap());
    let server = Running::start(command);
    wait_for_socket(socket.as_ref());
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, false).unwrap();
    if let Some(ready) = ready {
        wait_until(ready, || std::fs::read_to_string(scene.path("stderr")).unwrap().contains(ready));
    }
    api.resume().unwrap();
    machine.console.wait_for(".", 2);
    machine.console.assert_no_wrong_page();
    machine.process.kill().unwrap();
    document(&server.end())
}

#[test]
fn after_a_rebuilt_stream_next_to_nothing_faults() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    // What this host has seen of the first session, page maps' neighbours included.
    let first = wake(&scene, "home", &["--no-prefetch"], None);
    let before = count(&first, "faults");
    assert_eq!(count(&first, "streamed_pages"), 0, "{first}");
    assert!(before >= PAGES / 32, "each frame faults: {first}");

    let rebuilt = scene.done("home", &["stream", "rebuild", "vm"]);
    assert_eq!(rebuilt["from"], "recorded", "{rebuilt}");
    let pages = rebuilt["stream"]["pages"].as_u64().unwrap();
    assert!((PAGES..PAGES + 32 * OTHER_PAGES).contains(&pages), "{rebuilt}");

    // Elsewhere: another host, which has only the store.
    let second = wake(&scene, "elsewhere", &["--record-window", "0s"], Some("the resume stream is in place"));
    assert!(count(&second, "faults") <= 8, "from {before} faults: {second}");
    assert!(count(&second, "streamed_pages") >= PAGES, "{second}");
    let phases = second["timeline"]["phases"].as_array().unwrap();
    assert!(phases.iter().any(|p| p["name"] == "stream ready"), "{second}");

    // With a sample held out, that is all that faults, and it says that the stream covers what is needed.
    // When the window ends, all else is filled: on a slow machine that must not be before the guest has run.
    let window = ["--record-window", "60s"];
    let third = wake(&scene, "elsewhere", &window, Some("the resume stream is in place"));
    let measured = &third["working_set"];
    let held = |which: &str| measured[which].as_u64().unwrap();
    let (touched, samples) = (held("sampled_touched"), held("sampled_touched") + held("sampled_untouched"));
    assert_eq!((held("set_pages"), held("one_in")), (pages, 64.max(pages / 32)), "{third}");
    assert!(touched > 0 && samples <= pages / 8, "{third}");
    assert!(count(&third, "faults") <= touched + held("missed") + 8, "{third}");
    assert!(held("missed") <= 8 && measured["coverage"].as_f64().unwrap() > 0.95, "{third}");
    assert!(count(&third, "fetches") <= held("missed"), "held-out pages are at hand: {third}");

    // Both are shown, each where it is known.
    let shown = scene.done("elsewhere", &["show", "vm"]);
    assert_eq!(
        (&shown["stream"]["current"], &shown["stream"]["pages"]),
        (&true.into(), &pages.into()),
        "{shown}"
    );
    assert_eq!(
        (&shown["tier"], &shown["working_set"]["samples"]),
        (&"warm".into(), &samples.into()),
        "{shown}"
    );
    assert_eq!(shown["working_set"]["coverage"], measured["coverage"], "{shown}");
    assert_eq!(scene.done("nowhere", &["show", "vm"])["working_set"], Value::Null);
}

#[test]
fn many_wake_from_first_pages_decoded_once() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    scene.done("home", &["train", "vm", "--firecracker", scene.binary(), "--window", "1s"]);
    let socket = scene.text("uffd.sock");
    let tier = || scene.done("elsewhere", &["ls"])["snapshots"][0]["tier"].as_str().unwrap().to_owned();
    assert_eq!(tier(), "warm");
    let mut command = scene.dormouse("elsewhere", &["serve-uffd", "vm", "--socket", &socket]);
    let output = scene.path("reports");
    command.stdout(std::fs::File::create(&output).unwrap());
    let server = Running::start(command);
    wait_for_socket(socket.as_ref());
    assert_eq!(tier(), "hot");
    for clone in ["one", "two", "three"] {
        let machine = scene.start(clone);
        let api = machine.process.api(PATIENCE);
        api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
        machine.console.wait_for(".", 2);
        machine.console.assert_no_wrong_page();
        machine.process.kill().unwrap();
    }
    let reports = || {
        let text = std::fs::read_to_string(&output).unwrap();
        let documents = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        documents.map_while(Result::ok).collect::<Vec<_>>()
    };
    wait_until("three reports", || reports().len() == 3);
    for report in reports() {
        assert!(count(&report, "streamed_pages") >= PAGES / 2, "{report}");
        assert!(report["working_set"]["missed"].as_u64().unwrap() <= 8, "{report}");
    }
    server.kill();
    assert_eq!(tier(), "warm", "a server that was killed holds nothing");
}

#[test]
fn a_throw_away_clone_shows_what_is_touched() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    let trained = scene.done("home", &["train", "vm", "--firecracker", scene.binary(), "--window", "2s"]);
    let pages = trained["stream"]["pages"].as_u64().unwrap();
    // Page by page: no neighbour of a page that was touched is taken for one.
    assert!((PAGES..PAGES + OTHER_PAGES).contains(&pages), "{trained}");
    let report = wake(&scene, "elsewhere", &[], Some("the resume stream is in place"));
    assert!(report["working_set"]["missed"].as_u64().unwrap() <= 8, "{report}");
    assert_eq!(scene.done("home", &["stream", "rm", "vm"])["removed"], true);
    assert_eq!(scene.done("home", &["stream", "rm", "vm"])["removed"], false);
    assert_eq!(count(&wake(&scene, "elsewhere", &[], None), "streamed_pages"), 0);
    // What that host recorded is still known there, and nothing is where nothing was recorded.
    assert_eq!(scene.done("elsewhere", &["stream", "rebuild", "vm"])["from"], "recorded");
}

/// Pages of the stream that the next generation gets by this record.
fn predicted_pages(record: &Record) -> u64 {
    let pages = predict(Some(&record.session), &[], WORKING_SET_PAGES_MAX);
    pages.iter().map(|run| run.end - run.start).sum()
}

#[test]
fn the_next_generation_wakes_from_what_this_one_touched() {
    let Some(scene) = scene() else { return };
    let machine = scene.boot(true);
    machine.console.wait_for(".", 1);
    // Nothing is known yet of a guest that was booted elsewhere.
    let first = generations::standby(&scene, "host0", &scene.path("boot.sock"), "gen-0", &[]);
    assert_eq!(first["stream"], Value::Null, "{first}");
    drop(machine);

    // Each on a host of its own: what one knows of the machine, the next has from the store.
    let mut streamed = Vec::new();
    for generation in 1..=3 {
        let (before, now) = (format!("gen-{}", generation - 1), format!("gen-{generation}"));
        let host = format!("host{generation}");
        // All that is touched is seen where nothing is filled behind its back.
        let options = if generation == 1 { &["--no-prefetch"][..] } else { &[] };
        let mut awake = generations::wake(&scene, &before, &host, options);
        streamed.push(awake.document["stream_pages"].as_u64());
        awake.console.wait_for(".", 2);
        // The guest has touched its whole set by now, which is noted a little later.
        wait_until("a note of the whole working set", || {
            let notes = std::fs::read_dir(scene.path("run/dormouse")).unwrap().flatten();
            let notes = notes.filter(|f| f.path().extension().is_some_and(|e| e == "session"));
            let records = notes.filter_map(|f| Record::read(&f.path()).ok());
            records.map(|record| predicted_pages(&record)).any(|pages| pages >= PAGES)
        });
        let socket = awake.document["api_socket"].as_str().unwrap().to_owned();
        let document = generations::standby(&scene, &host, socket.as_ref(), &now, &[]);
        let pages = document["stream"]["pages"].as_u64().unwrap();
        assert!((PAGES..PAGES + 64 * OTHER_PAGES).contains(&pages), "{document}");
        awake.done();
        awake.console.assert_no_wrong_page();
        let report = awake.report();
        if generation > 1 {
            let measured = &report["working_set"];
            assert!(measured["missed"].as_u64().unwrap() <= 8, "{report}");
            assert!(measured["coverage"].as_f64().unwrap() > 0.95, "{report}");
        }
        // The note goes with the process it is of.
        let notes = std::fs::read_dir(scene.path("run/dormouse")).unwrap();
        assert!(!notes.flatten().any(|f| f.path().extension().is_some_and(|e| e == "session")));
    }
    assert_eq!(streamed[0], None);
    assert!(streamed[1..].iter().all(|pages| pages.is_some_and(|p| p >= PAGES)), "{streamed:?}");
}

#[test]
fn a_stream_that_misses_much_is_replaced_while_the_guest_runs() {
    let Some(scene) = scene() else { return };
    parked(&scene);
    // Only the device state, and then a guess that is far too small.
    assert_eq!(scene.done("home", &["stream", "rebuild", "vm"])["from"], "nothing");
    let record = scene.path("record");
    let few = r#"{"version": 1, "name": "vm", "snapshot": "", "recorded_unix_ms": 0, "window_ms": 0,
                  "complete": true, "session": {"missed": [[4096, 64]]}}"#;
    std::fs::write(&record, few).unwrap();
    let from_record = ["stream", "rebuild", "vm", "--from-record", record.to_str().unwrap()];
    let rebuilt = scene.done("home", &from_record);
    assert_eq!((&rebuilt["from"], &rebuilt["stream"]["pages"]), (&"record".into(), &64.into()), "{rebuilt}");
    std::fs::write(&record, "{}").unwrap();
    let refused = scene.dormouse("home", &from_record).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "that is no record");

    let socket = scene.text("uffd.sock");
    let arguments = ["serve-uffd", "vm", "--socket", &socket, "--once", "--record-window", "1s"];
    let server = Running::start(scene.dormouse("home", &arguments));
    wait_for_socket(socket.as_ref());
    let machine = scene.start("wake");
    let api = machine.process.api(PATIENCE);
    api.load_snapshot_uffd(&scene.path("vmstate"), socket.as_ref(), false, true).unwrap();
    machine.console.wait_for(".", 2);
    let pages = || scene.done("home", &["show", "vm"])["stream"]["pages"].as_u64().unwrap();
    wait_until("a better stream", || pages() >= PAGES);
    machine.console.assert_no_wrong_page();
    machine.process.kill().unwrap();
    document(&server.end());
}
