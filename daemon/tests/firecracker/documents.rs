//! The commands that the documents show are run as they stand there: README.md, docs/SERVICE.md and docs/CLI.md.
//!
//! Every line of an indented block is a command. One that cannot be run as it is, is listed below with the reason or with
//! what surrounds it; one that fails and is not listed fails the test, and so does a listed one that no document has.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    scene::{Scene, scene},
    serve_uffd::parked,
};

/// What becomes of a line that is not run as it is.
enum Line {
    /// It is not run, for this reason.
    NotRun(&'static str),
    /// It is run amid this; `LINE` stands for it.
    Amid(&'static str),
}
use Line::{Amid, NotRun};

/// Serves until it is told to end; it says so when it serves.
const SERVING: &str = "exec 3< <(exec LINE 2>> serve.log); serve=$!; read -r _ <&3";

const LISTED: &[(&str, Line)] = &[
    (
        "scripts/demo",
        NotRun("it sets the machine up and builds; the tests of `dormouse demo` run what it shows"),
    ),
    ("scripts/test", NotRun("it is what runs this")),
    ("cargo install --path daemon", NotRun("it builds what is run here")),
    (
        "dormouse resume firecracker monday --firecracker /usr/bin/firecracker",
        Amid(
            "exec 3< <(exec LINE); resumed=$!; read -r _ <&3; read -r _ _ api <&3; \
             dormouse stop --no-daemon --api-socket \"$api\"; wait \"$resumed\"",
        ),
    ),
    (
        "dormouse serve",
        Amid("exec 3< <(exec LINE 2>> serve.log); serve=$!; read -r _ <&3; kill \"$serve\"; wait \"$serve\""),
    ),
    ("dormouse --store s3://bucket/prefix serve --firecracker /usr/bin/firecracker", Amid(SERVING)),
    ("curl \"localhost/v1/vms/web-1?wait_s=600\"", Amid("LINE & waiting=$!")),
    ("curl localhost/v1/vms/web-1/standby -d '{\"name\": \"tuesday\"}'", Amid("LINE; wait \"$waiting\"")),
    (
        "curl -X DELETE localhost/v1/listeners/ID",
        Amid("ID=$(curl localhost/v1/listeners | sed -E 's/.*\"id\": ?\"([^\"]+)\".*/\\1/'); LINE"),
    ),
    ("dormouse [OPTIONS] COMMAND ...", NotRun("the form of all commands")),
    (
        "{\"error\": {\"kind\": \"no_such_snapshot\", \"message\": \"...\", \"retryable\": false}}",
        NotRun("what a command prints"),
    ),
];

/// Commands of a document's indented blocks, without comments. What a brace or a backslash leaves open goes on in the next line.
fn commands(document: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let mut open = false;
    for line in document.lines().filter_map(|line| line.strip_prefix("    ")) {
        let line = line.split(" #").next().unwrap().trim_end();
        match commands.last_mut().filter(|_| open) {
            Some(command) => *command = format!("{command}\n{line}"),
            None if line.is_empty() || line.starts_with('#') => continue,
            None => commands.push(line.to_owned()),
        }
        let command = commands.last().unwrap();
        open = command.ends_with('\\') || command.matches('{').count() > command.matches('}').count();
    }
    commands
}

/// Ends what was started with a path below this directory in its arguments, whatever becomes of the test.
struct Ended(PathBuf);

impl Drop for Ended {
    fn drop(&mut self) {
        let here = self.0.to_str().unwrap().to_owned();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u64>() else { continue };
            let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&arguments).contains(&here) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
    }
}

/// A directory in which the documents' commands find what they name.
struct Shell<'a> {
    scene: &'a Scene,
    home: PathBuf,
    _ended: Ended,
}

impl<'a> Shell<'a> {
    fn new(scene: &'a Scene) -> Self {
        let home = scene.path("shell");
        fs::create_dir_all(home.join("bin")).unwrap();
        fs::create_dir_all(home.join("tmp")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dormouse"), home.join("bin/dormouse")).unwrap();
        // An answer that tells of an error is one.
        let curl = home.join("bin/curl");
        fs::write(&curl, "#!/bin/sh\nPATH=${PATH#*:} exec curl --fail-with-body \"$@\"\n").unwrap();
        fs::set_permissions(&curl, fs::Permissions::from_mode(0o755)).unwrap();
        Shell { scene, _ended: Ended(scene.path("")), home }
    }

    /// The command with the paths of this scene, amid what it needs.
    fn line(&self, command: &str, used: &mut HashSet<String>) -> Option<String> {
        let line = match LISTED.iter().find(|(listed, _)| *listed == command) {
            None => command.to_owned(),
            Some((listed, line)) => {
                used.insert((*listed).to_owned());
                match line {
                    NotRun(why) => {
                        eprintln!("not run: {command}: {why}");
                        return None;
                    }
                    Amid(amid) => amid.replace("LINE", &command.replace("/ID", "/$ID")),
                }
            }
        };
        let line = line.strip_prefix("17 * * * *").unwrap_or(&line).to_owned();
        let places = [
            ("/usr/bin/firecracker", self.scene.binary().to_owned()),
            ("/run/vm.sock", self.scene.text("boot.sock")),
            ("/run/other.sock", self.scene.text("boot.sock")),
            ("/run/pool/7.sock", self.scene.text("pool.sock")),
            ("/run/uffd.sock", self.scene.text("listener.sock")),
            ("s3://bucket/prefix", self.store()),
            ("s3://bucket/machines", self.store()),
        ];
        Some(places.iter().fold(line, |line, (from, to)| line.replace(from, to)))
    }

    fn store(&self) -> String {
        self.home.join(".local/share/dormouse").to_str().unwrap().to_owned()
    }

    /// Runs a document's commands in one shell, which ends at the first that fails.
    fn run(&self, name: &str, document: &str, used: &mut HashSet<String>) {
        let mut script =
            String::from("set -euE -o pipefail\ntrap 'echo \"FAILED: $BASH_COMMAND\" >&2' ERR\n");
        let commands = commands(document);
        assert!(!commands.is_empty(), "{name} shows no commands");
        for line in commands.iter().filter_map(|command| self.line(command, used)) {
            script += &line;
            script += "\n";
        }
        script += "if [ -n \"${serve:-}\" ] && kill \"$serve\" 2> /dev/null; then wait \"$serve\"; fi\n";
        let path = self.home.join("script");
        fs::write(&path, &script).unwrap();
        let log = fs::File::create(self.home.join("log")).unwrap();
        let mut command = Command::new("bash");
        for (variable, _) in std::env::vars_os() {
            let text = variable.to_string_lossy();
            if text.starts_with("DORMOUSE_") || text.starts_with("XDG_") {
                command.env_remove(&variable);
            }
        }
        let bin = format!("{}:{}", self.home.join("bin").display(), std::env::var("PATH").unwrap());
        command.arg(&path).current_dir(&self.home).env("HOME", &self.home).env("PATH", bin);
        command.env("XDG_RUNTIME_DIR", self.home.join("run")).env("TMPDIR", self.home.join("tmp"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let status = command.status().unwrap();
        let said = |file: &str| fs::read_to_string(self.home.join(file)).unwrap_or_default();
        assert!(!said("serve.log").contains('\x1b'), "a log that is redirected has colours");
        assert!(status.success(), "{name}: {status}\n{script}\n{}\n{}", said("log"), said("serve.log"));
    }
}

/// A running guest at `boot.sock`, in place of one that was there.
fn running(scene: &Scene) -> crate::scene::Machine {
    let _ = fs::remove_file(scene.path("boot.sock"));
    scene.boot(true)
}

#[test]
fn the_commands_that_the_documents_show_work() {
    let Some(scene) = scene() else { return };
    if !Path::new("/usr/bin/curl").exists() {
        dormouse_testkit::skipped!("there is no curl, which docs/SERVICE.md uses");
        return;
    }
    parked(&scene);
    let shell = Shell::new(&scene);
    let file = |name: &str| shell.home.join(name).to_str().unwrap().to_owned();
    let state = format!("vmstate={}", file("guest.vmstate"));
    scene.done("home", &["export", "vm", "--memory", &file("guest.mem"), "--state", &state]);
    let mut memory = fs::read(file("guest.mem")).unwrap();
    memory[4096..8192].fill(7);
    fs::write(file("guest2.mem"), memory).unwrap();
    fs::write(file("guest.ext4"), vec![1; 5000]).unwrap();

    let mut used = HashSet::new();
    let asleep = running(&scene);
    shell.run("README.md", include_str!("../../../README.md"), &mut used);
    drop(asleep);
    let restored = |name: &str| fs::read(shell.home.join(name)).unwrap();
    assert!(restored("restored.mem") == restored("guest2.mem"), "the export of README.md is another");
    // Its state is called otherwise than what `standby` stores, and it is the only one there is.
    let wake = "dormouse resume firecracker monday --firecracker /usr/bin/firecracker";
    let base = shell.line(wake, &mut used).unwrap().replace("monday", "base");
    shell.run("a snapshot of files", &format!("    {base}\n"), &mut used);

    let (_other, _pool) = (running(&scene), scene.start("pool"));
    shell.run("docs/SERVICE.md", include_str!("../../../docs/SERVICE.md"), &mut used);
    shell.run("docs/CLI.md", include_str!("../../../docs/CLI.md"), &mut used);
    for (listed, _) in LISTED {
        assert!(used.contains(*listed), "listed, and in no document: {listed}");
    }
}
