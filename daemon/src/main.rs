//! The `dormouse` command: machines on perpetual standby.
//!
//! | module | holds |
//! |---|---|
//! | `cli` | what can be written on the command line |
//! | `commands` | one file per command |
//! | `serve` | the daemon |
//! | `client` | asking the daemon |
//! | `context` | what the global options mean: the store, the key, the caches |
//! | `key` | where the key of an encrypted domain comes from |
//! | `logging`, `traces` | the log, and spans for OpenTelemetry |
//! | `output`, `table`, `human` | one JSON document, or text for people |
//! | `progress` | bars on a terminal |
//! | `failure` | what went wrong, its kind and exit code |
#![forbid(unsafe_code)]

mod cli;
mod client;
mod commands;
mod context;
mod failure;
mod human;
mod key;
mod logging;
mod machine;
mod output;
mod progress;
mod serve;
mod table;
mod traces;

fn main() -> std::process::ExitCode {
    cli::main()
}
