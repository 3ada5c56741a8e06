//! The command line's promises: one document, exit codes, options anywhere.
use std::fs;

use crate::home::{Home, image};

/// A home with one snapshot called `a`.
fn with_snapshot() -> Home {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 100, 0)).unwrap();
    fs::write(home.path("s"), b"state").unwrap();
    home.done(&[
        "import",
        "a",
        "--memory",
        "m",
        "--state",
        "vm=s",
        "--label",
        "os=debian",
        "--label",
        "note=a=b",
    ]);
    home
}

#[test]
fn every_command_prints_exactly_one_document() {
    let home = with_snapshot();
    let commands: &[&[&str]] = &[
        &["ls"],
        &["show", "a"],
        &["stream", "rebuild", "a"],
        &["stream", "rm", "a"],
        &["cool", "a"],
        &["du"],
        &["verify"],
        &["verify", "a", "--quick"],
        &["export", "a", "--memory", "copy"],
        &["import", "b", "--memory", "m"],
        &["rm", "b"],
        &["repack", "--dry-run"],
        &["repack"],
        &["gc"],
        &["gc", "--dry-run", "--grace", "0s"],
        &["key", "generate"],
    ];
    for command in commands {
        assert!(home.json(command).is_object(), "{command:?}");
    }
}

#[test]
fn people_get_text_and_not_json() {
    let home = with_snapshot();
    for command in [
        &["ls"][..],
        &["stream", "rebuild", "a"],
        &["show", "a"],
        &["stream", "rm", "a"],
        &["cool", "a"],
        &["du"],
        &["verify"],
        &["export", "a", "--memory", "copy"],
        &["rm", "a"],
        &["ls"],
    ] {
        let text = home.done(command).stdout;
        assert!(!text.is_empty() && !text.starts_with('{'), "{command:?}: {text}");
    }
}

#[test]
fn global_options_stand_before_or_after_the_command() {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 20, 0)).unwrap();
    home.done(&["--store", "here", "import", "a", "--memory", "m"]);
    assert!(home.path("here").is_dir() && !home.path(".local").exists(), "--store is obeyed");
    let url = format!("file://{}", home.text("here"));
    let before = home.done(&["--json", "--store", &url, "ls"]).document();
    let after = home.done(&["ls", "--store", &url, "--json"]).document();
    let around = home.done(&["--store", &url, "ls", "--json"]).document();
    assert_eq!(before, after);
    assert_eq!(before, around);
    assert_eq!(before["snapshots"][0]["name"], "a");
    let mut by_environment = home.command(&["ls", "--json"]);
    let by_environment = crate::home::Ran::of(by_environment.env("DORMOUSE_STORE", &url).output().unwrap());
    assert_eq!(by_environment.document(), before);
}

#[test]
fn wrong_usage_is_exit_code_2_and_does_nothing() {
    let home = with_snapshot();
    let wrong: &[&[&str]] = &[
        &["frobnicate"],
        &["import"],
        &["import", "x"],
        &["import", "../x", "--memory", "m"],
        &["import", "x", "--memory", "m", "--disk", "nofile"],
        &["import", "x", "--disk", "d=m", "--disk", "d=m"],
        &["import", "x", "--memory", "m", "--state", "s=s", "--state", "s=s"],
        &["import", "x", "--memory", "m", "--label", "no-value"],
        &["import", "x", "--memory", "m", "--level", "99"],
        &["import", "x", "--memory", "m", "--diff", "memory"],
        &["import", "x", "--memory", "m", "--parent", "a", "--diff", "disk"],
        &["export", "a"],
        &["du", "--price", "-1"],
        &["gc", "--grace", "soon"],
        &["ls", "--store", "ftp://somewhere"],
        &["key", "id"],
    ];
    for args in wrong {
        let error = home.error(2, args);
        assert_eq!(error["kind"], "usage", "{args:?}: {error}");
    }
    assert_eq!(home.run(&[]).code, 2);
    assert_eq!(home.json(&["ls"])["snapshots"].as_array().unwrap().len(), 1);
}

#[test]
fn what_fails_is_exit_code_1_with_a_kind() {
    let home = with_snapshot();
    let cases: &[(&str, &[&str])] = &[
        ("no_such_snapshot", &["show", "nobody"]),
        ("no_such_snapshot", &["rm", "nobody"]),
        ("no_such_snapshot", &["verify", "nobody"]),
        ("no_such_snapshot", &["export", "nobody", "--memory", "x"]),
        ("no_such_snapshot", &["import", "x", "--parent", "nobody", "--memory", "m"]),
        ("no_such_part", &["export", "a", "--state", "other=x"]),
        ("file", &["import", "x", "--memory", "no-such-file"]),
        ("file", &["export", "a", "--memory", "no/such/folder/x"]),
        ("key", &["ls", "--key-file", "no-such-file"]),
        ("key", &["ls", "--key-file", "s"]),
        ("key", &["ls", "--key-command", "exit 3"]),
    ];
    for (kind, args) in cases {
        assert_eq!(home.error(1, args)["kind"], *kind, "{args:?}");
    }
}

#[test]
fn help_and_version_are_not_errors() {
    let home = Home::new();
    for args in [&["--help"][..], &["--version"], &["import", "--help"], &["help", "du"]] {
        let ran = home.done(args);
        assert!(!ran.stdout.is_empty() && ran.stderr.is_empty(), "{args:?}");
    }
    assert!(!home.path(".local").exists(), "asking for help makes no store");
}

#[test]
fn show_and_ls_tell_what_was_imported() {
    let home = with_snapshot();
    let show = home.json(&["show", "a"]);
    assert_eq!(show["images"][0]["id"], "memory");
    assert_eq!(show["images"][0]["bytes"], 100 * 4096);
    assert_eq!(show["states"][0]["id"], "vm");
    assert_eq!(show["states"][0]["bytes"], 5);
    assert_eq!(show["encrypted"], false);
    assert_eq!(show["most_packs_in_a_section"], 1);
    assert_eq!(show["expires_unix_ms"], 0, "kept for ever unless told otherwise");
    let text = home.done(&["show", "a"]).stdout;
    assert!(text.contains("os=debian") && text.contains("note=a=b"), "{text}");
    let ls = home.json(&["ls"]);
    assert_eq!(ls["snapshots"][0]["snapshot"], show["snapshot"]);
}

#[test]
fn du_counts_shared_pages_once_and_multiplies_by_the_price() {
    let home = with_snapshot();
    home.done(&["import", "b", "--parent", "a", "--memory", "m"]);
    let du = home.json(&["du", "--price", "1000000"]);
    let rows = du["snapshots"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for figures in rows.iter().chain([&du]) {
        for field in ["logical_bytes", "nonzero_bytes", "unique_bytes", "stored_bytes", "objects"] {
            assert!(figures[field].is_u64(), "{field} in {figures}");
        }
        let (stored, dollars) =
            (figures["stored_bytes"].as_f64().unwrap(), figures["dollars_per_month"].as_f64().unwrap());
        assert!((dollars - stored / 1000.0).abs() < 1e-6, "{figures}");
    }
    assert_eq!(du["logical_bytes"], 2 * 100 * 4096);
    assert_eq!(du["unique_bytes"], rows[0]["unique_bytes"], "both snapshots have the same pages");
    let on_disk: u64 = home.objects("").iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert_eq!(du["stored_bytes"], on_disk);
    assert_eq!(du["objects"], home.objects("").len());
    assert_eq!(home.json(&["du"])["price_per_gb_month"], 0.023);
}

#[test]
fn a_name_is_only_taken_over_if_told_so() {
    let home = with_snapshot();
    let before = home.json(&["show", "a"]);
    fs::write(home.path("m"), image(2, 30, 0)).unwrap();
    assert_eq!(home.error(1, &["import", "a", "--memory", "m"])["kind"], "exists");
    assert_eq!(home.json(&["show", "a"]), before);
    home.done(&["import", "a", "--replace", "--memory", "m", "--expires", "30d"]);
    let after = home.json(&["show", "a"]);
    assert_ne!(after["snapshot"], before["snapshot"]);
    assert_ne!(after["expires_unix_ms"], 0);
    home.done(&["rm", "a"]);
    assert_eq!(home.json(&["ls"])["snapshots"].as_array().unwrap().len(), 0);
}

#[test]
fn a_reader_that_goes_away_is_not_an_error() {
    let home = with_snapshot();
    let mut child = home.command(&["show", "a"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn gc_frees_what_rm_left_and_nothing_else() {
    let home = with_snapshot();
    let before = home.objects("").len();
    fs::write(home.path("n"), image(5, 200, 0)).unwrap();
    home.done(&["import", "b", "--memory", "n"]);
    home.done(&["rm", "b"]);
    let full = home.objects("packs");
    let plan = home.json(&["gc", "--dry-run", "--grace", "0s"]);
    assert_eq!(plan["dry_run"], true);
    assert!(plan["deleted_objects"].as_u64().unwrap() >= 2, "{plan}");
    assert_eq!(home.objects("packs"), full, "a dry run deletes nothing");
    home.done(&["gc"]);
    assert_eq!(home.objects("packs"), full, "the grace time is not over");
    let report = home.json(&["gc", "--grace", "0s"]);
    assert_eq!(report["deleted_objects"], plan["deleted_objects"], "the dry run said so");
    assert_eq!(home.json(&["du"])["unreferenced_bytes"], 0);
    assert!(home.objects("").len() <= before + 1, "no garbage is left: {:?}", home.objects(""));
    home.done(&["export", "a", "--memory", "copy"]);
    assert!(fs::read(home.path("copy")).unwrap() == fs::read(home.path("m")).unwrap());
}

#[test]
fn repack_moves_pages_without_changing_any_snapshot() {
    let home = with_snapshot();
    home.done(&["import", "b", "--parent", "a", "--memory", "m"]);
    let identities = |home: &Home| ["a", "b"].map(|name| home.json(&["show", name])["snapshot"].take());
    let (before, packs) = (identities(&home), home.objects("packs"));
    assert!(home.json(&["repack", "--dry-run"])["rewritten_packs"].as_u64().unwrap() > 0);
    assert_eq!(home.objects("packs"), packs, "a dry run writes nothing");
    let some = home.json(&["repack", "--dry-run", "--max-bytes", "1K"]);
    assert_eq!(some["rewritten_packs"], 1, "one there must be: {some}");
    assert_eq!(home.run(&["repack", "--max-bytes", "much"]).code, 2);
    let report = home.json(&["repack"]);
    assert_eq!(report["moved_snapshots"], 2, "{report}");
    home.done(&["gc", "--grace", "0s"]);
    assert_eq!(identities(&home), before);
    assert_eq!(home.json(&["repack"])["rewritten_packs"], 0, "what is dense is left alone");
    fs::remove_dir_all(home.path(".cache/dormouse")).unwrap();
    assert_eq!(home.json(&["verify"])["clean"], true);
    for name in ["a", "b"] {
        home.done(&["export", name, "--memory", "copy"]);
        assert!(fs::read(home.path("copy")).unwrap() == fs::read(home.path("m")).unwrap(), "{name}");
    }
}
