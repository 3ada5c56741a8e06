//! Starts the machine's processes, and leaves nothing behind: neither processes nor files, however the demo ends.

use std::{
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use dormouse_core::Name;
use dormouse_minivm::timeline::monotonic_now;

use super::{Kind, guest::Woke};
use crate::{cli::args::GlobalOptions, context::Context, failure::Failure};

/// What the temporary directories of demos are called, up to a random end.
pub(super) const PREFIX: &str = "dormouse-demo-";

/// The store the machine sleeps in, and its name there.
pub(super) struct Place {
    context: Context,
    name: Name,
    temporary: Option<Temporary>,
}

/// A directory that is removed when the demo ends, and also when it is killed: a process of its own sees to
/// that. It waits for the end of its standard input, which the kernel brings about if nobody else does.
struct Temporary {
    dir: Option<tempfile::TempDir>,
    sweeper: Child,
}

impl Place {
    /// The store of the global options, or a temporary one.
    pub(super) fn new(context: &Context) -> Result<Self, Failure> {
        let name =
            Name::new(format!("demo-{}", std::process::id())).map_err(|e| Failure::usage(e.to_string()))?;
        let mut global = context.global().clone();
        let temporary = match &global.store {
            Some(url) if url.starts_with("memory:") => {
                return Err(Failure::usage(
                    "the demo's machine sleeps without any process, so memory:// cannot hold it: \
                     give --store a directory or a bucket, or leave it out",
                ));
            }
            Some(_) => None,
            None => {
                let temporary = Temporary::new()?;
                let dir = temporary.dir.as_ref().map(tempfile::TempDir::path);
                let store = dir.map(|d| d.join("store")).and_then(|d| Some(d.to_str()?.to_owned()));
                global.store = Some(store.ok_or_else(|| Failure::usage("TMPDIR is not UTF-8"))?);
                global.cache_dir = dir.map(|d| d.join("cache"));
                Some(temporary)
            }
        };
        Ok(Place { context: Context::new(global), name, temporary })
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    /// Whether the store was made for the demo.
    pub(super) fn is_temporary(&self) -> bool {
        self.temporary.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.temporary.is_none() {
            let removed = self.context.open_store().and_then(|s| Ok(s.remove(&self.name)?));
            if let Err(error) = removed {
                tracing::warn!(name = %self.name, %error, "the demo's snapshot could not be removed");
            }
        }
    }
}

impl Temporary {
    fn new() -> Result<Self, Failure> {
        let cannot = |e: std::io::Error| Failure::file("making a directory in", &std::env::temp_dir(), &e);
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().map_err(cannot)?;
        let mut command = this_program()?;
        // A group of its own: what interrupts the demo at a terminal does not reach it.
        command.args(["demo-guest", "sweep"]).arg(dir.path()).stdin(Stdio::piped()).process_group(0);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let sweeper = command.spawn().map_err(|e| cannot_start(&e))?;
        Ok(Temporary { dir: Some(dir), sweeper })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        drop(self.dir.take());
        drop(self.sweeper.stdin.take());
        // It ends at once; that it cannot be waited for leaves nothing to do.
        let _ = self.sweeper.wait();
    }
}

/// The sweeper's work: waits for the demo to end, then removes its directory.
pub(super) fn sweep(dir: &Path) -> Result<(), Failure> {
    // Whether it ends or breaks: nobody holds the other end any more.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    let ours = dir.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    if !ours {
        return Err(Failure::usage(format!("{} is not a demo's directory", dir.display())));
    }
    // A machine may still be writing while it is being killed.
    for _ in 0..50 {
        if !dir.exists() || std::fs::remove_dir_all(dir).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Err(Failure::new("file", format!("{} could not be removed", dir.display())))
}

/// A machine and where it sleeps.
pub(super) struct Machine<'a> {
    pub(super) place: &'a Place,
    pub(super) kind: Kind,
    pub(super) pages: u64,
}

impl Machine<'_> {
    /// Boots it in a process of its own, which ends when the machine is on standby.
    pub(super) fn boot(&self) -> Result<(), Failure> {
        self.run("boot").map(drop)
    }

    /// Wakes it without knowing what it will touch, remembers that, and puts it on standby again.
    pub(super) fn rehearse(&self) -> Result<(), Failure> {
        self.run("rehearse").map(drop)
    }

    /// Wakes it in a new process, and lets it end when it has verified all its pages.
    pub(super) fn wake(&self) -> Result<Woke, Failure> {
        let printed = self.run("wake")?;
        serde_json::from_slice(&printed)
            .map_err(|e| Failure::new("demo", format!("the waking process did not say how it went: {e}")))
    }

    fn run(&self, step: &str) -> Result<Vec<u8>, Failure> {
        let mut command = this_program()?;
        command.args(["demo-guest", step, self.place.name.as_str()]);
        command.args(["--pages", &self.pages.to_string(), "--guest"]);
        command.arg(if self.kind == Kind::Kvm { "kvm" } else { "process" });
        command.args(["--parent", &std::process::id().to_string()]);
        pass_on(self.place.context.global(), &mut command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // The request: from here on the clock runs.
        command.args(["--begun", &monotonic_now().as_nanos().to_string()]);
        let output = command.output().map_err(|e| cannot_start(&e))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            eprint!("{said}");
            return Ok(output.stdout);
        }
        let said = said.trim().trim_start_matches("error: ");
        let message = format!("the machine's process failed to {step} ({}): {said}", output.status);
        Err(Failure::new("demo", message))
    }
}

/// Gives a process of ours the global options that matter to it.
fn pass_on(global: &GlobalOptions, command: &mut Command) {
    if let Some(store) = &global.store {
        command.args(["--store", store]);
    }
    if let Some(path) = &global.key_file {
        command.arg("--key-file").arg(path);
    }
    if let Some(key_command) = &global.key_command {
        command.args(["--key-command", key_command]);
    }
    if let Some(dir) = &global.cache_dir {
        command.arg("--cache-dir").arg(dir);
    }
}

fn this_program() -> Result<Command, Failure> {
    std::env::current_exe().map(Command::new).map_err(|e| cannot_start(&e))
}

fn cannot_start(why: &std::io::Error) -> Failure {
    Failure::new("demo", format!("no process can be started for the machine: {why}"))
}
