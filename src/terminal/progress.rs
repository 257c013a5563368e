//! [`Progress`] on stderr: a bar on a terminal, one line every 30 s elsewhere.

use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::format_count;

/// Minimum duration of a wait that is reported in a note.
pub(crate) const SHORTEST_SHOWN_WAIT: Duration = Duration::from_secs(5);

/// Interval between progress lines if stderr is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// Progress of one long operation, without colours.
pub struct Progress {
    label: &'static str,
    total: u64,
    output: ProgressOutput,
}

enum ProgressOutput {
    /// A bar on a terminal.
    Bar(ProgressBar),
    /// A line at most every [`LINE_INTERVAL`].
    Lines { last_printed: Instant },
    /// Only the lines of [`Progress::note`].
    Notes,
    /// No output.
    Quiet,
}

impl Progress {
    /// Starts the progress display. `total` is a number of units, such as requests or optimizer steps. With
    /// `quiet`, nothing is shown.
    pub fn new(label: &'static str, total: u64, quiet: bool) -> Self {
        let output = if quiet {
            ProgressOutput::Quiet
        } else if stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            // If the template were invalid, the default style would show the same numbers.
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {wide_msg}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(label);
            ProgressOutput::Bar(bar)
        } else {
            ProgressOutput::Lines {
                last_printed: Instant::now(),
            }
        };
        Self {
            label,
            total,
            output,
        }
    }

    /// Creates a display that shows only notes, for a part of an operation that already has a progress display.
    pub fn notes(quiet: bool) -> Self {
        let output = if quiet {
            ProgressOutput::Quiet
        } else {
            ProgressOutput::Notes
        };
        Self {
            label: "",
            total: 0,
            output,
        }
    }

    /// Shows that `done` of `total` units are complete. `details` is called only if its text is shown; it must return
    /// sanitised text.
    pub fn update(&mut self, done: u64, details: impl FnOnce() -> String) {
        match &mut self.output {
            ProgressOutput::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(details());
            }
            ProgressOutput::Lines { last_printed } if last_printed.elapsed() >= LINE_INTERVAL => {
                *last_printed = Instant::now();
                let (done, total) = (format_count(done), format_count(self.total));
                write_line(&format!("{}: {done} of {total}, {}", self.label, details()));
            }
            ProgressOutput::Lines { .. } | ProgressOutput::Notes | ProgressOutput::Quiet => {}
        }
    }

    /// Prints a line immediately, above the bar if there is one.
    pub fn note(&self, line: &str) {
        match &self.output {
            ProgressOutput::Bar(bar) => bar.suspend(|| write_line(line)),
            ProgressOutput::Lines { .. } | ProgressOutput::Notes => write_line(line),
            ProgressOutput::Quiet => {}
        }
    }
}

/// Progress of reading large files in MB, shown only after `Self::SHOW_AFTER`.
pub struct ReadProgress {
    label: &'static str,
    quiet: bool,
    started: Instant,
    /// None until [`Self::SHOW_AFTER`] has passed.
    progress: Option<Progress>,
}

impl ReadProgress {
    const SHOW_AFTER: Duration = Duration::from_millis(300);
    const MB: u64 = 1_000_000;

    /// Creates a display that is not shown yet. With `quiet`, it is never shown.
    pub fn new(label: &'static str, quiet: bool) -> Self {
        Self {
            label,
            quiet,
            started: Instant::now(),
            progress: None,
        }
    }

    /// Shows that `done` of `total` bytes have been read.
    pub fn update(&mut self, done: u64, total: u64) {
        if self.progress.is_none() && self.started.elapsed() < Self::SHOW_AFTER {
            return;
        }
        let progress = self
            .progress
            .get_or_insert_with(|| Progress::new(self.label, total / Self::MB, self.quiet));
        progress.update(done / Self::MB, || "in MB".to_owned());
    }
}

impl Drop for Progress {
    /// Clears the bar, so that only the result stays on the screen.
    fn drop(&mut self) {
        if let ProgressOutput::Bar(bar) = &self.output {
            bar.finish_and_clear();
        }
    }
}

/// Writes a line to stderr; ignores errors. `eprintln!` would panic if stderr is a closed pipe.
fn write_line(line: &str) {
    let _ = writeln!(stderr().lock(), "{line}");
}
