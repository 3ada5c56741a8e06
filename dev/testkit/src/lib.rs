//! What tests of several packages share. It depends on none of them.
#![forbid(unsafe_code)]

use std::{fmt::Arguments, fs::OpenOptions, io::Write as _};

/// Says that the running test cannot run here, and why, as `format!` takes it. The test returns then.
///
/// Cargo's test runner knows tests that are ignored always, and none that find out. So a test that finds out passes;
/// `scripts/test` takes those named in the file of `DORMOUSE_SKIPPED` from the passed and counts them as ignored.
#[macro_export]
macro_rules! skipped {
    ($($why:tt)*) => { $crate::skip(format_args!($($why)*)) };
}

/// What [`skipped!`] does.
pub fn skip(why: Arguments<'_>) {
    eprintln!("SKIPPED: {why}");
    let Some(list) = std::env::var_os("DORMOUSE_SKIPPED") else { return };
    let line = format!("{}: {why}\n", this_test());
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&list)
        .and_then(|mut f| f.write_all(line.as_bytes()));
    assert!(
        written.is_ok(),
        "{} cannot be written, and a test that is not counted counts as passed",
        list.display()
    );
}

/// The running test, by its program and its name: that of its thread, or, where one process runs one test, of its argument.
fn this_test() -> String {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default();
    let program = program.rsplit_once('-').map_or(program, |(name, _)| name).to_owned();
    let thread = std::thread::current().name().filter(|name| *name != "main").map(str::to_owned);
    let name = thread.or_else(|| arguments.find(|argument| !argument.starts_with('-')));
    format!("{program} {}", name.unwrap_or_else(|| "?".into()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_test_knows_what_it_is_called() {
        let told = super::this_test();
        assert_eq!(told, "dormouse_testkit tests::a_test_knows_what_it_is_called");
    }
}
