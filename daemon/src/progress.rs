//! Progress bars: on standard error, and only if that is a terminal.

use std::{io::IsTerminal as _, time::Duration};

use dormouse_chunkstore::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over the bytes of one job; gone from the screen once dropped.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar titled by what is being done. Not shown if `quiet`, nor where nobody looks.
    pub(crate) fn new(doing: &str, quiet: bool) -> Self {
        let seen = !quiet && std::io::stderr().is_terminal();
        let target = if seen { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let template = "{msg}  {bar:32}  {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta} left";
        // The template is fixed: were it wrong, the plain bar would do.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar =
            ProgressBar::with_draw_target(Some(0), target).with_style(style).with_message(doing.to_owned());
        if seen {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Bar { bar }
    }
}

impl Progress for Bar {
    fn begin(&self, total_bytes: u64) {
        self.bar.set_position(0);
        self.bar.set_length(total_bytes);
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
