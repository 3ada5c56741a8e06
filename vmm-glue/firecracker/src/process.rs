//! A Firecracker process of our own.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::api::ApiClient;
use dormouse_vmm_common::listener::{ListenError, remove_stale_socket};

/// Between two looks for the API socket of a starting Firecracker.
const LOOK_INTERVAL: Duration = Duration::from_micros(200);

/// A running Firecracker. Dropping it kills it, unless [`Firecracker::detach`] lets it go its own way.
#[derive(Debug)]
pub struct Firecracker {
    child: Option<Child>,
    stdin: Option<ChildStdin>,
    api_socket: PathBuf,
}

/// What to start, and where its output goes.
#[derive(Clone, Debug)]
pub struct FirecrackerOptions {
    /// The static binary.
    pub binary: PathBuf,
    /// Where its API listens.
    pub api_socket: PathBuf,
    /// The file its standard output and error go to, and with it the guest's serial port.
    pub console: PathBuf,
    /// Where its standard input, and with it the guest's serial input, comes from.
    pub input: ConsoleInput,
    /// The file its log goes to. `None` leaves it on standard output, amid what the guest says.
    pub log: Option<PathBuf>,
    /// Whether it is in a process group of its own, and so outlives a Ctrl-C at the terminal of this process. It cannot
    /// read from that terminal then.
    pub own_group: bool,
}

/// Where a guest's serial input comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConsoleInput {
    /// [`Firecracker::type_bytes`].
    #[default]
    Typed,
    /// This process's own standard input.
    Inherited,
    /// This file. A FIFO is opened for writing too, so that it neither blocks nor ends when its writers go.
    File(PathBuf),
    /// Nowhere.
    Nothing,
}

/// Why Firecracker could not be started or spoken to.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The binary cannot be run.
    #[error("cannot run {binary}: {source}. Is it Firecracker's static binary, and executable?")]
    Spawn {
        /// The path given.
        binary: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The console file cannot be made.
    #[error("cannot write the console to {path}: {source}")]
    Console {
        /// The path given.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The console's input cannot be opened.
    #[error("cannot read the console's input from {path}: {source}")]
    Input {
        /// The path given.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The log file cannot be made.
    #[error("cannot write Firecracker's log to {path}: {source}")]
    Log {
        /// The path given.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Something is at the API socket's path.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// It ended before its API was there.
    #[error("Firecracker ended with {status} before its API was there; its console may say why")]
    Ended {
        /// How.
        status: std::process::ExitStatus,
    },
    /// Somebody else's API is there.
    #[error(
        "process {pid}, not the Firecracker started for it, listens at {path}; give each an API socket of its own"
    )]
    Taken {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        pid: i32,
    },
    /// Its API did not come.
    #[error("Firecracker's API socket {0} did not come in time")]
    NoApi(PathBuf),
    /// Its console input or its process failed.
    #[error("Firecracker's process: {0}")]
    Io(#[from] io::Error),
}

impl Firecracker {
    /// Starts it and waits until its API takes connections.
    ///
    /// # Errors
    /// [`ProcessError`]; the process is gone then.
    pub fn spawn(options: &FirecrackerOptions, timeout: Duration) -> Result<Self, ProcessError> {
        let FirecrackerOptions { binary, api_socket, console, input, log, own_group } = options;
        remove_stale_socket(api_socket)?;
        let console_error = |source| ProcessError::Console { path: console.clone(), source };
        let output = File::create(console).map_err(console_error)?;
        let errors = output.try_clone().map_err(console_error)?;
        let mut command = Command::new(binary);
        command.arg("--api-sock").arg(api_socket);
        if let Some(log) = log {
            // Firecracker opens its log but does not make it.
            let made = File::options().append(true).create(true).open(log);
            made.map_err(|source| ProcessError::Log { path: log.clone(), source })?;
            command.arg("--log-path").arg(log);
        }
        if *own_group {
            command.process_group(0);
        }
        let mut child = command
            .stdin(match input {
                ConsoleInput::Typed => Stdio::piped(),
                ConsoleInput::Inherited => Stdio::inherit(),
                ConsoleInput::File(path) => {
                    let opened = File::options().read(true).write(true).open(path);
                    opened.map_err(|source| ProcessError::Input { path: path.clone(), source })?.into()
                }
                ConsoleInput::Nothing => Stdio::null(),
            })
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|source| ProcessError::Spawn { binary: binary.clone(), source })?;
        let stdin = child.stdin.take();
        let mut started = Self { child: Some(child), stdin, api_socket: api_socket.clone() };
        started.wait_for_api(timeout)?;
        Ok(started)
    }

    fn wait_for_api(&mut self, timeout: Duration) -> Result<(), ProcessError> {
        let deadline = Instant::now() + timeout;
        let connection = loop {
            if let Ok(connection) = UnixStream::connect(&self.api_socket) {
                break connection;
            }
            if let Some(status) = self.try_wait()? {
                return Err(ProcessError::Ended { status });
            }
            if Instant::now() >= deadline {
                return Err(ProcessError::NoApi(self.api_socket.clone()));
            }
            std::thread::sleep(LOOK_INTERVAL);
        };
        // Two that were started at once for one path: it is the other's. What is started may be a script around it.
        let listener = rustix::net::sockopt::socket_peercred(&connection).map_err(io::Error::from)?.pid;
        let ours = self.child.as_ref().map(Child::id);
        match ours.is_some_and(|ours| descends(listener.as_raw_nonzero().get(), ours)) {
            true => Ok(()),
            false => {
                let (path, pid) = (self.api_socket.clone(), listener.as_raw_nonzero().get());
                // Its socket is not for us to remove.
                if let Some(mut child) = self.child.take() {
                    child.kill()?;
                    child.wait()?;
                }
                Err(ProcessError::Taken { path, pid })
            }
        }
    }

    /// A client of its API. A request may take `timeout`.
    pub fn api(&self, timeout: Duration) -> ApiClient {
        ApiClient::new(&self.api_socket, timeout)
    }

    /// Its process id; `None` once it was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Sends `bytes` to the guest's serial port.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn type_bytes(&mut self, bytes: &[u8]) -> Result<(), ProcessError> {
        if let Some(stdin) = &mut self.stdin {
            stdin.write_all(bytes)?;
        }
        Ok(())
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn try_wait(&mut self) -> Result<Option<std::process::ExitStatus>, ProcessError> {
        Ok(self.child.as_mut().map(Child::try_wait).transpose()?.flatten())
    }

    /// Kills it and waits until it is gone, then removes its API socket.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn kill(mut self) -> Result<(), ProcessError> {
        self.end()
    }

    /// Lets it live on when this process ends; its serial input ends then. Gives its process id.
    pub fn detach(mut self) -> Option<u32> {
        self.child.take().map(|child| child.id())
    }

    fn end(&mut self) -> Result<(), ProcessError> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill()?;
        child.wait()?;
        remove_stale_socket(&self.api_socket)?;
        Ok(())
    }
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, "Firecracker could not be ended");
        }
    }
}

/// Whether process `pid` is `ancestor`, or was started by it or by what it started.
fn descends(pid: i32, ancestor: u32) -> bool {
    let mut next = u32::try_from(pid).ok();
    while let Some(pid) = next.filter(|pid| *pid > 1) {
        if pid == ancestor {
            return true;
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may hold anything: state, parent.
        next = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
    }
    false
}
