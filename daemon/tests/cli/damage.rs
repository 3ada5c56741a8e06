//! Whatever happens to an object of the store: a named error or nothing at all, never a wrong byte.
use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::home::{Home, flip, image};

type Harm = fn(&Path, &Path);

/// What can happen to an object, given another one of its kind.
const HARMS: [(&str, Harm); 5] = [
    ("missing", |path, _| fs::remove_file(path).unwrap()),
    ("truncated", |path, _| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }),
    ("emptied", |path, _| fs::write(path, b"").unwrap()),
    ("flipped", |path, _| flip(path)),
    ("swapped", |path, other| fs::copy(other, path).map(drop).unwrap()),
];

/// Two snapshots that share nothing.
fn with_two() -> (Home, Vec<u8>) {
    let home = Home::new();
    let memory = image(1, 3000, 0);
    fs::write(home.path("m"), &memory).unwrap();
    fs::write(home.path("n"), image(77, 40, 0)).unwrap();
    fs::write(home.path("s"), b"state").unwrap();
    home.done(&["import", "whole", "--memory", "n", "--state", "vm=s"]);
    home.done(&["import", "hurt", "--memory", "m", "--state", "vm=s"]);
    (home, memory)
}

#[test]
fn no_harm_to_any_object_ever_yields_a_wrong_byte() {
    let (home, memory) = with_two();
    for folder in ["refs", "roots", "packs"] {
        let objects = home.objects(folder);
        assert!(objects.len() >= 2, "{folder}: {objects:?}");
        for object in &objects {
            for (harm, act) in HARMS {
                let other: &PathBuf = objects.iter().find(|o| *o != object).unwrap();
                let before = fs::read(object).unwrap();
                act(object, other);
                check(&home, &memory, &format!("{harm} {}", object.display()));
                fs::write(object, before).unwrap();
            }
        }
    }
    assert_eq!(home.json(&["verify"])["clean"], true, "all harm was undone");
}

/// Export either gives the right bytes or a named error; `verify` agrees with it.
fn check(home: &Home, memory: &[u8], case: &str) {
    let _ = fs::remove_file(home.path("out"));
    let ran = home.run(&["export", "hurt", "--memory", "out", "--state", "vm=out2", "--json"]);
    let verify = home.run(&["verify", "hurt", "--json"]);
    if ran.code == 0 {
        assert!(fs::read(home.path("out")).unwrap() == memory, "{case}: a wrong byte");
        return;
    }
    assert_eq!(ran.code, 1, "{case}: {}", ran.stderr);
    assert!(!home.path("out").exists(), "{case}: half an export");
    let error = ran.document()["error"].take();
    let kind = error["kind"].as_str().unwrap();
    assert!(["missing", "damaged", "no_such_snapshot", "too_new"].contains(&kind), "{case}: {error}");
    if kind == "no_such_snapshot" {
        assert!(case.contains("/refs/"), "{case}: {error}");
        return;
    }
    let object = error["object"].as_str().unwrap_or_else(|| panic!("{case}: no object in {error}"));
    assert!(case.contains(object), "{case}: blames {object}");
    assert_eq!(verify.code, 1, "{case}: verify finds nothing wrong");
    let report = verify.document();
    let named = report["damages"].as_array().unwrap().iter().any(|d| {
        d["object"].as_str() == Some(object) && d["hurts"].as_array().unwrap().contains(&"hurt".into())
    });
    assert!(named, "{case}: verify does not say that {object} hurts: {report}");
}

#[test]
fn verify_tells_who_is_hurt_and_who_is_not() {
    let (home, _) = with_two();
    let largest = home.objects("packs").into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    flip(&largest);
    assert_eq!(home.json(&["verify", "whole"])["clean"], true);
    let quick = home.json(&["verify", "--quick"]);
    assert_eq!(quick["clean"], true, "a quick look does not read pages");
    let ran = home.run(&["verify", "--json"]);
    assert_eq!(ran.code, 1, "damage is a failure");
    let report = ran.document();
    assert_eq!(report["damages"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["damages"][0]["hurts"], serde_json::json!(["hurt"]));
    fs::remove_file(&largest).unwrap();
    assert_eq!(home.run(&["verify", "--quick"]).code, 1, "a missing pack is seen even by a quick look");
    let text = home.run(&["verify"]).stdout;
    assert!(text.contains("hurts hurt"), "{text}");
}

#[test]
fn repair_restores_what_a_file_still_has_and_says_what_is_left() {
    let (home, memory) = with_two();
    let largest = |home: &Home| {
        home.objects("packs").into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap()
    };
    let pack = largest(&home);
    fs::remove_file(&pack).unwrap();
    let before = home.json(&["show", "hurt"])["snapshot"].clone();
    let left = home.run(&["verify", "--repair", "--json"]);
    assert_eq!(left.code, 1, "{}", left.stdout);
    let document = left.document();
    assert_eq!(document["clean"], false);
    assert_eq!(document["damages"], document["found"]);
    assert_eq!(document["damages"][0]["hurts"], serde_json::json!(["hurt"]));
    let done = home.json(&["verify", "--repair", "--from", "n", "--from", "m"]);
    assert_eq!(done["clean"], true, "{done}");
    assert!(pack.ends_with(done["found"][0]["object"].as_str().unwrap()), "{done}");
    assert_eq!(done["repaired"][0]["sources"], serde_json::json!(["image_file"]));
    assert_eq!(home.json(&["show", "hurt"])["snapshot"], before);
    home.done(&["gc", "--grace", "0s"]);
    home.done(&["export", "hurt", "--memory", "out"]);
    assert!(fs::read(home.path("out")).unwrap() == memory);
    // For people, too; and a file is of use to repairs only.
    flip(&largest(&home));
    let ran = home.run(&["verify", "hurt", "--repair", "--from", "m"]);
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(ran.stdout.contains("had back") && ran.stdout.contains("an image file"), "{}", ran.stdout);
    assert_eq!(home.run(&["verify", "--from", "m"]).code, 2);
    assert_eq!(home.run(&["verify", "--quick", "--repair"]).code, 2);
}
