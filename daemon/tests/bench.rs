//! `dormouse bench` measures and says so in one document. How fast a machine is, no test can say.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

#[test]
fn a_row_has_a_value_a_floor_and_their_ratio() {
    let may = std::path::Path::new("/dev/userfaultfd");
    if std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none() && std::fs::File::open(may).is_err() {
        eprintln!("SKIPPED: /dev/userfaultfd may not be opened, and measuring needs it");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .args(["bench", "--json", "--quick", "--row", "install_hot_16mib"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = document["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1, "{document}");
    assert_eq!((&rows[0]["name"], &rows[0]["unit"]), (&"install_hot_16mib".into(), &"ms".into()));
    let number = |key: &str| rows[0][key].as_f64().unwrap();
    let ratio = number("value") / number("floor");
    assert!((ratio - number("ratio")).abs() < 0.01 * ratio, "{document}");
}

#[test]
fn an_unknown_row_is_named_with_those_there_are() {
    let output = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .args(["bench", "--row", "no_such_row"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("install_hot_64mib"), "{text}");
}
