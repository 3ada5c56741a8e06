//! Files that imports read and exports write: what stands still, what is replaced, what is a stream.
use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::home::{Home, Ran, image};

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

/// A home with a snapshot called `a`: a memory, a disk called `root`, and a large state called `vm`.
fn with_parts() -> Home {
    let home = Home::new();
    fs::write(home.path("m"), image(1, 700, 5)).unwrap();
    fs::write(home.path("r"), image(2, 300, 0)).unwrap();
    fs::write(home.path("s"), image(3, 400, 7)).unwrap();
    home.done(&["import", "a", "--memory", "m", "--disk", "root=r", "--state", "vm=s"]);
    home
}

fn same(home: &Home, a: &str, b: &str) {
    assert!(fs::read(home.path(a)).unwrap() == fs::read(home.path(b)).unwrap(), "{a} is not {b}");
}

fn mode(home: &Home, file: &str) -> u32 {
    fs::metadata(home.path(file)).unwrap().permissions().mode() & 0o7777
}

#[test]
fn an_export_writes_through_symbolic_links_and_keeps_them() {
    let home = with_parts();
    fs::create_dir(home.path("elsewhere")).unwrap();
    fs::write(home.path("elsewhere/disk"), b"old").unwrap();
    symlink("elsewhere/disk", home.path("link")).unwrap();
    symlink("link", home.path("second")).unwrap();
    symlink("elsewhere/state", home.path("dangling")).unwrap();
    home.done(&["export", "a", "--disk", "root=second", "--state", "vm=dangling"]);
    for link in ["link", "second", "dangling"] {
        assert!(fs::symlink_metadata(home.path(link)).unwrap().is_symlink(), "{link} was replaced");
    }
    same(&home, "elsewhere/disk", "r");
    same(&home, "elsewhere/state", "s");
    // What another name of standard output stands for is written to, and that name stays.
    symlink("/proc/self/fd/1", home.path("out")).unwrap();
    let ran = home.command(&["export", "a", "--memory", "out"]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(ran.stdout == fs::read(home.path("m")).unwrap(), "nothing else is on standard output");
    assert!(fs::symlink_metadata(home.path("out")).unwrap().is_symlink());
}

#[test]
fn an_export_obeys_the_umask_and_keeps_the_mode_of_what_it_replaces() {
    let home = with_parts();
    fs::write(home.path("secret"), b"old").unwrap();
    fs::set_permissions(home.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(home.path("open"), b"old").unwrap();
    fs::set_permissions(home.path("open"), fs::Permissions::from_mode(0o664)).unwrap();
    let export = |umask: &str, memory: &str, state: &str| {
        let script = format!("umask {umask}; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_dormouse"), "export", "a"]);
        command.args(["--memory", memory, "--state", &format!("vm={state}")]);
        let ran = command.current_dir(home.path("")).env("HOME", home.path("")).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    };
    export("077", "m2", "s2");
    assert_eq!((mode(&home, "m2"), mode(&home, "s2")), (0o600, 0o600));
    export("027", "m3", "s3");
    assert_eq!((mode(&home, "m3"), mode(&home, "s3")), (0o640, 0o640));
    export("022", "secret", "open");
    assert_eq!((mode(&home, "secret"), mode(&home, "open")), (0o600, 0o664));
    same(&home, "secret", "m");
    same(&home, "open", "s");
}

#[test]
fn two_parts_are_not_exported_into_one_file() {
    let home = with_parts();
    fs::create_dir(home.path("dir")).unwrap();
    fs::write(home.path("x"), b"old").unwrap();
    symlink("x", home.path("link")).unwrap();
    let full = home.text("x");
    for (memory, disk) in
        [("x", "x"), ("x", "./x"), ("x", "dir/../x"), ("link", "x"), ("x", &full), ("new", "./new")]
    {
        let error = home.error(2, &["export", "a", "--memory", memory, "--disk", &format!("root={disk}")]);
        assert!(error["message"].as_str().unwrap().contains("same file"), "{error}");
    }
    home.error(2, &["export", "a", "--disk", "root=dir/y", "--state", "vm=dir/../dir/y"]);
    assert_eq!(fs::read(home.path("x")).unwrap(), b"old", "nothing is touched");
    assert!(!home.path("new").exists() && !home.path("dir/y").exists());
    home.done(&["export", "a", "--memory", "/dev/null", "--disk", "root=/dev/null"]);
}

#[test]
fn an_export_that_is_killed_leaves_no_file_behind() {
    let home = with_parts();
    fs::create_dir(home.path("dir")).unwrap();
    fs::write(home.path("dir/old"), b"old").unwrap();
    assert!(Command::new("mkfifo").arg(home.path("fifo")).status().unwrap().success());
    let args = ["export", "a", "--memory", "dir/old", "--disk", "root=dir/new", "--state", "vm=fifo"];
    let mut child = home.command(&args).spawn().unwrap();
    // The state comes last, and is more than the pipe takes: the images are written, and not in their place yet.
    let reader = File::open(home.path("fifo")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    drop(reader);
    let left: Vec<_> = fs::read_dir(home.path("dir")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["old"]);
    assert_eq!(fs::read(home.path("dir/old")).unwrap(), b"old");
    // What had a name, where files cannot be without one, goes with the next export.
    fs::write(home.path("dir/.dormouse-export-1-0"), b"left").unwrap();
    home.done(&["export", "a", "--memory", "dir/old"]);
    assert!(!home.path("dir/.dormouse-export-1-0").exists());
    same(&home, "dir/old", "m");
}

#[test]
fn a_pipe_is_filled_in_order_and_to_its_end() {
    let home = with_parts();
    assert!(Command::new("mkfifo").arg(home.path("fifo")).status().unwrap().success());
    let mut child = home.command(&["export", "a", "--memory", "fifo"]).spawn().unwrap();
    let read = fs::read(home.path("fifo")).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(read == fs::read(home.path("m")).unwrap());
}

/// Runs with this file, or what is written to a pipe, as standard input.
fn fed(home: &Home, args: &[&str], stdin: Stdio, bytes: Option<&[u8]>) -> Ran {
    let mut command = home.command(args);
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), bytes) {
        // One that is refused does not read.
        let _ = pipe.write_all(bytes);
    }
    Ran::of(child.wait_with_output().unwrap())
}

#[test]
fn a_minus_sign_reads_and_writes_streams() {
    let home = Home::new();
    let memory = image(1, 5000, 1234);
    fs::write(home.path("m"), &memory).unwrap();
    let piped = fed(&home, &["import", "a", "--memory", "-"], Stdio::piped(), Some(&memory));
    assert_eq!(piped.code, 0, "{}", piped.stderr);
    let file = Stdio::from(File::open(home.path("m")).unwrap());
    let from_file = fed(&home, &["import", "b", "--memory", "-", "--json"], file, None);
    assert_eq!(from_file.document()["new_bytes"], 0, "it is the same");
    let state =
        fed(&home, &["import", "c", "--memory", "m", "--state", "vm=-"], Stdio::piped(), Some(b"state"));
    assert_eq!(state.code, 0, "{}", state.stderr);
    for (name, part, expected) in
        [("a", "--memory=-", &memory[..]), ("b", "--memory=-", &memory), ("c", "--state=vm=-", b"state")]
    {
        let ran = home.command(&["export", name, part]).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        assert!(ran.stdout == expected, "{name} came back differently");
    }
}

#[test]
fn streams_that_make_no_sense_are_refused() {
    let home = with_parts();
    for args in [
        &["import", "x", "--memory", "-", "--disk", "root=-"][..],
        &["import", "x", "--memory", "-", "--state", "vm=-"],
        &["import", "x", "--parent", "a", "--memory", "-", "--diff", "memory"],
        &["export", "a", "--memory", "-"],
        &["export", "a", "--memory", "-", "--disk", "root=-"],
    ] {
        home.error(2, args);
    }
    let two = home.run(&["export", "a", "--memory", "-", "--state", "vm=/dev/stdout"]);
    assert_eq!((two.code, two.stdout.as_str()), (2, ""), "{}", two.stderr);
}

#[test]
fn parts_of_bytes_are_not_more_than_they_have() {
    let home = Home::new();
    for file in ["m", "r"] {
        fs::write(home.path(file), file).unwrap();
    }
    let report = home.json(&["import", "a", "--memory", "m", "--disk", "root=r"]);
    for figures in [report, home.json(&["ls"])["snapshots"][0].take(), home.json(&["du"])] {
        assert_eq!(
            (&figures["logical_bytes"], &figures["nonzero_bytes"]),
            (&2.into(), &2.into()),
            "{figures}"
        );
    }
}
