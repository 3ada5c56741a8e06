//! Commands that are ended by a signal.

use std::{fs, process::Stdio, thread};

use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, Signal, kill_process},
};

use crate::home::{Home, image};

#[test]
fn a_collector_ended_by_a_signal_lets_the_next_begin() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 20, 0)).unwrap();
    home.done(&["import", "a", "--memory", "m"]);
    // It has its lease by the time it reads announcements, and nobody ever writes this one.
    let domain = home.path(".local/share/dormouse/plain");
    let endless = domain.join("announced").join("0".repeat(64));
    fs::create_dir_all(endless.parent().unwrap()).unwrap();
    mknodat(CWD, &endless, FileType::Fifo, Mode::from(0o600), 0).unwrap();
    let mut collector = home.command(&["gc", "--grace", "0s"]).stderr(Stdio::null()).spawn().unwrap();
    let lease = domain.join("gc/lease");
    while fs::metadata(&lease).map_or(0, |meta| meta.len()) == 0 {
        assert!(collector.try_wait().unwrap().is_none(), "it goes on until it is told not to");
        thread::yield_now();
    }
    kill_process(Pid::from_child(&collector), Signal::TERM).unwrap();
    assert_eq!(collector.wait().unwrap().code(), Some(128 + 15));
    let left = fs::read_to_string(&lease).unwrap();
    assert!(left.starts_with("nobody"), "the lease is given back: {left}");
    fs::remove_file(&endless).unwrap();
    home.done(&["gc", "--grace", "0s"]);
}
