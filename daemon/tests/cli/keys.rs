//! Encrypted domains from the command line: every source of a key, and what the wrong one leads to.
use std::{fs, os::unix::fs::MetadataExt as _};

use crate::home::{Home, Ran, image};

fn with_key() -> Home {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 100, 0)).unwrap();
    home.done(&["key", "generate", "--out", "key"]);
    home.done(&["import", "a", "--memory", "m", "--key-file", "key"]);
    home
}

#[test]
fn every_source_of_the_key_opens_the_same_domain() {
    let home = with_key();
    let hex = fs::read_to_string(home.path("key")).unwrap();
    let expected = home.json(&["ls", "--key-file", "key"]);
    assert_eq!(expected["snapshots"][0]["name"], "a");
    assert_eq!(home.json(&["ls", "--key-command", "cat key"]), expected);
    for (variable, value) in [("DORMOUSE_KEY_FILE", "key"), ("DORMOUSE_KEY", hex.trim())] {
        let mut command = home.command(&["ls", "--json"]);
        assert_eq!(
            Ran::of(command.env(variable, value).output().unwrap()).document(),
            expected,
            "{variable}"
        );
    }
    let mut both = home.command(&["ls"]);
    both.env("DORMOUSE_KEY_FILE", "key").env("DORMOUSE_KEY", hex.trim());
    assert_eq!(Ran::of(both.output().unwrap()).code, 2, "two keys are one too many");
    assert_eq!(home.run(&["ls", "--key-file", "key", "--key-command", "cat key"]).code, 2);
}

#[test]
fn without_its_key_a_snapshot_is_not_there_and_nothing_shows_its_name_or_pages() {
    let home = with_key();
    home.done(&["key", "generate", "--out", "other"]);
    assert_eq!(home.error(1, &["show", "a"])["kind"], "key_missing");
    assert_eq!(home.error(1, &["ls"])["kind"], "key_missing");
    let wrong = home.error(1, &["show", "a", "--key-file", "other"]);
    assert_eq!(wrong["kind"], "wrong_key");
    let id = home.json(&["key", "id", "--key-file", "key"])["key_id"].as_str().unwrap().to_owned();
    assert!(
        wrong["message"].as_str().unwrap().contains(&id),
        "the keys that the store knows are named: {wrong}"
    );
    let store = home.path(".local/share/dormouse");
    let files = std::process::Command::new("find").arg(&store).arg("-type").arg("f").output().unwrap();
    let files = String::from_utf8(files.stdout).unwrap();
    assert!(files.lines().count() >= 4, "{files}");
    for file in files.lines() {
        let bytes = fs::read(file).unwrap();
        assert!(!bytes.windows(8).any(|w| w == b"dormouse"), "{file} holds plain text");
        assert!(!file.ends_with("/refs/a"), "the name is in the clear");
    }
}

#[test]
fn objects_of_another_domain_are_a_wrong_key_not_damage() {
    let home = with_key();
    home.done(&["key", "generate", "--out", "other"]);
    home.done(&["import", "b", "--memory", "m", "--key-file", "other"]);
    let id = |key| home.json(&["key", "list", "--key-file", key])["domain"].as_str().unwrap().to_owned();
    let store = home.path(".local/share/dormouse");
    let (mine, theirs) = (store.join(id("key")), store.join(id("other")));
    // As if somebody gave one domain's folder the other's name.
    fs::remove_dir_all(&mine).unwrap();
    fs::rename(theirs, mine).unwrap();
    let report = home.run(&["verify", "--key-file", "key", "--json"]);
    assert_eq!(report.code, 1);
    let document = report.document();
    assert!(document["damages"][0]["why"].as_str().unwrap().contains("key"), "{document}");
}

#[test]
fn a_key_file_is_private_and_never_overwritten() {
    let home = with_key();
    let before = fs::read(home.path("key")).unwrap();
    assert_eq!(fs::metadata(home.path("key")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(home.error(1, &["key", "generate", "--out", "key"])["kind"], "file");
    assert_eq!(fs::read(home.path("key")).unwrap(), before);
    let printed = home.json(&["key", "generate"]);
    assert_eq!(printed["key"].as_str().unwrap().len(), 64);
    assert_ne!(home.json(&["key", "generate"])["key"], printed["key"], "two keys are two");
}

#[test]
fn a_rotated_key_opens_what_the_old_one_did() {
    let home = with_key();
    home.done(&["key", "generate", "--out", "new"]);
    home.done(&["key", "rotate", "--key-file", "key", "--new-key-file", "new"]);
    for key in ["key", "new"] {
        assert_eq!(home.json(&["ls", "--key-file", key])["snapshots"][0]["name"], "a", "{key}");
    }
    let list = home.json(&["key", "list", "--key-file", "new"]);
    assert_eq!(list["keys"].as_array().unwrap().len(), 2);
    assert_eq!(list["keys"].as_array().unwrap().iter().filter(|k| k["in_use"] == true).count(), 1);
    let done = home.json(&["key", "rotate", "--key-file", "key", "--new-key-file", "new", "--drop-old"]);
    assert_eq!(done["dropped_old"], true);
    let stale = home.error(1, &["ls", "--key-file", "key"]);
    assert_eq!(stale["kind"], "wrong_key");
    assert!(stale["message"].as_str().unwrap().contains(done["new_key_id"].as_str().unwrap()), "{stale}");
    home.done(&["export", "a", "--key-file", "new", "--memory", "out"]);
    assert_eq!(fs::read(home.path("out")).unwrap(), fs::read(home.path("m")).unwrap());
}
