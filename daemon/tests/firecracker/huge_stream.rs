//! A guest of 2 MiB pages wakes from a resume stream, whose pages are of 4 KiB.

use crate::scene::{PAGES, Scene};
use crate::serve_uffd::count;
use crate::working_set::wake;

/// Pages of 4 KiB in one of 2 MiB.
const PER_PAGE: u64 = 512;

/// Pages that were brought because of a fault. The kernel may tell of a fault again and again while its page is on its way.
pub(crate) fn faulted(report: &serde_json::Value) -> u64 {
    count(report, "handed_over")
}

/// `vm` is a guest of 2 MiB pages that is asleep: what it touches is streamed, put together and installed whole.
pub(crate) fn comes_in_whole_pages(scene: &Scene) {
    let first = wake(scene, "home", &["--no-prefetch"], None);
    let before = faulted(&first);
    assert_eq!(count(&first, "streamed_pages"), 0, "{first}");
    assert!(before >= PAGES / PER_PAGE, "each page faults: {first}");
    let rebuilt = scene.done("home", &["stream", "rebuild", "vm"]);
    assert_eq!(rebuilt["from"], "recorded", "{rebuilt}");
    assert!(rebuilt["stream"]["pages"].as_u64().unwrap() >= PAGES, "{rebuilt}");

    // One that faults while Firecracker loads may come by its fault and not by the stream.
    let in_place = |report: &serde_json::Value| count(report, "streamed_pages") + faulted(report);
    let ready = Some("the resume stream is in place");
    let second = wake(scene, "elsewhere", &["--record-window", "0s"], ready);
    assert!(count(&second, "streamed_pages") >= PAGES / PER_PAGE - 1, "{second}");
    assert!((PAGES / PER_PAGE..=before + 2).contains(&in_place(&second)), "{second}");
    assert!(faulted(&second) <= 2, "from {before} faults: {second}");

    // None is held out of it, so only what faults beside it is known of it.
    let third = wake(scene, "elsewhere", &["--record-window", "60s"], ready);
    let measured = |which: &str| third["working_set"][which].as_u64().unwrap();
    let set = measured("set_pages") / PER_PAGE;
    assert_eq!((measured("set_pages") % PER_PAGE, measured("one_in")), (0, 0), "{third}");
    assert!((set..=set + 2).contains(&in_place(&third)), "{third}");
    assert!(measured("missed") <= 2 && faulted(&third) <= 2, "{third}");
    let installed = count(&third, "copy_ioctls") - count(&third, "exists");
    assert!(installed <= set + measured("missed"), "each page is installed once, whole: {third}");
}
