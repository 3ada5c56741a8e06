//! Drives the built binary in a home of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

/// A home directory for one test: store, cache and files are in it, and nothing of the real one is seen.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

/// What a run left behind.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Home { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The path as text, for arguments.
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The command with a clean environment.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        command.args(args).current_dir(self.dir.path()).env("HOME", self.dir.path());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("DORMOUSE_") || text.starts_with("XDG_") {
                command.env_remove(&name);
            }
        }
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().unwrap())
    }

    /// Runs what must succeed.
    pub(crate) fn done(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "dormouse {args:?} failed: {}", ran.stderr);
        ran
    }

    /// Runs what must succeed, with `--json`, and parses its one document.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        self.done(&args).document()
    }

    /// Runs what must fail with this exit code, with `--json`, and gives the error.
    pub(crate) fn error(&self, code: i32, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        let ran = self.run(&args);
        assert_eq!(ran.code, code, "dormouse {args:?}: {}{}", ran.stdout, ran.stderr);
        let error = ran.document()["error"].take();
        let message = error["message"].as_str().expect("an error has a message");
        assert!(ran.stderr.contains(message.lines().next().unwrap()), "people are told the same");
        error
    }

    /// Every object of the default store below a folder of the plain domain.
    pub(crate) fn objects(&self, folder: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.path(".local/share/dormouse/plain").join(folder), &mut found);
        found.sort();
        found
    }
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        Ran {
            code: output.status.code().expect("not killed by a signal"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Standard output, which must be exactly one JSON document.
    pub(crate) fn document(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "a document is one line: {:?}", self.stdout);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {:?}", self.stdout))
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}

/// An image of `pages` pages, most of which differ from each other and from those of another seed; some are
/// zero, some repeat, and it ends `tail` bytes into a further page.
pub(crate) fn image(seed: u64, pages: usize, tail: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; pages * 4096 + tail];
    for (i, page) in bytes.chunks_mut(4096).enumerate() {
        let kind = match i % 5 {
            0 => continue,
            1 => 7,
            _ => seed.wrapping_mul(1_000_003) + i as u64,
        };
        let mut state = kind.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for (at, byte) in page.iter_mut().enumerate() {
            // A third noise, the rest text, so that it compresses as memory does.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = if at % 3 == 0 { (state >> 56) as u8 } else { b"dormouse"[at % 8] };
        }
    }
    bytes
}

/// Flips one bit in the middle of a file.
pub(crate) fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}
