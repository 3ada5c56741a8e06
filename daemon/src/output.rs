//! What goes to standard output: one JSON document, or text for people. Everything else goes to standard error.

use std::{
    io::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use serde::Serialize;

use crate::failure::Failure;

/// Whether standard output has its document. A command that serves a VM prints one when that runs, and may fail later.
static PRINTED: AtomicBool = AtomicBool::new(false);

/// Prints `document` as JSON if `json`, and what `text` writes otherwise.
///
/// # Errors
/// Standard output cannot be written. A reader that has gone (`| head`) is not an error.
pub(crate) fn print<T: Serialize>(
    json: bool,
    document: &T,
    text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut stdout = io::BufWriter::new(io::stdout().lock());
    PRINTED.store(true, Ordering::Relaxed);
    let written = if json { write_json(&mut stdout, document) } else { text(&mut stdout) };
    match written.and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new("output", format!("standard output cannot be written: {e}")))
        }
        _ => Ok(()),
    }
}

/// One line, so that whoever reads a stream of documents knows where each ends.
fn write_json<T: Serialize>(to: &mut dyn Write, document: &T) -> io::Result<()> {
    serde_json::to_writer(&mut *to, document)?;
    writeln!(to)
}

/// Tells of a failure: a sentence on standard error, and with `json` a document as well, unless there was one before: two
/// would be none that a reader can parse.
pub(crate) fn failure(failure: &Failure, json: bool) {
    // If standard error cannot be written, the exit code still tells.
    let _ = writeln!(io::stderr(), "error: {failure}");
    if json && !PRINTED.load(Ordering::Relaxed) {
        failure_document(failure);
    }
}

/// Prints `{"error": {...}}`.
pub(crate) fn failure_document(failure: &Failure) {
    #[derive(Serialize)]
    struct Document<'a> {
        error: &'a Failure,
    }
    let _ = write_json(&mut io::stdout().lock(), &Document { error: failure });
}
