//! Files that imports read and exports write: what stands still, what is replaced, what is a stream.
use std::{
    fs::{self, File},
    io::Write as _,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::home::{Home, image};

#[test]
fn a_file_that_grows_under_an_import_is_not_stored() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 4000, 0)).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut file = File::options().append(true).open(home.path("m")).unwrap();
            while !over.load(Ordering::Relaxed) {
                file.write_all(b"more").unwrap();
            }
        });
        let error = home.run(&["import", "a", "--memory", "m", "--json"]);
        let stored = home.run(&["import", "b", "--memory", "m", "--allow-changing", "--json"]);
        over.store(true, Ordering::Relaxed);
        assert_eq!((error.code, &error.document()["error"]["kind"]), (1, &"changed".into()));
        assert_eq!(stored.code, 0, "{}", stored.stderr);
    });
    let ls = home.json(&["ls"]);
    assert_eq!(ls["snapshots"].as_array().unwrap().len(), 1, "{ls}");
    assert_eq!(ls["snapshots"][0]["name"], "b");
}

#[test]
fn a_device_or_pipe_is_refused_as_an_image_or_state() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 10, 0)).unwrap();
    assert!(Command::new("mkfifo").arg(home.path("fifo")).status().unwrap().success());
    for args in [
        &["import", "a", "--memory", "/dev/zero"][..],
        &["import", "a", "--memory", "fifo"],
        &["import", "a", "--memory", "m", "--state", "vm=/dev/zero"],
        &["import", "a", "--memory", "m", "--state", "vm=fifo"],
    ] {
        let error = home.error(2, args);
        assert!(error["message"].as_str().unwrap().contains(" is a "), "{error}");
    }
}
