//! `dormouse bench` measures and says so in one document. How fast a machine is, no test can say.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

#[test]
fn a_row_is_measured_and_explained() {
    let may = std::path::Path::new("/dev/userfaultfd");
    if std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none() && std::fs::File::open(may).is_err() {
        dormouse_testkit::skipped!("/dev/userfaultfd may not be opened, and measuring needs it");
        return;
    }
    let run = |json: &[&str]| {
        let row = ["bench", "--quick", "--row", "install_hot_16mib"];
        let output = Command::new(env!("CARGO_BIN_EXE_dormouse")).args(row).args(json).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // It fails unless each of its pages is in place, so that a path that installs nothing has no time.
    let document: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    let rows = document["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1, "{document}");
    assert_eq!((&rows[0]["name"], &rows[0]["unit"]), (&"install_hot_16mib".into(), &"ms".into()));
    // The copies alone of 16 MiB take more than a microsecond, and a row that is not a number is null.
    for key in ["value", "floor", "ratio"] {
        assert!(rows[0][key].as_f64().is_some_and(|number| number > 0.001), "{document}");
    }
    let text = run(&[]);
    let legend = text.lines().find_map(|line| line.strip_prefix("install_hot_16mib: "));
    assert!(legend.is_some_and(|legend| legend.contains("against raw copies")), "{text}");
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
