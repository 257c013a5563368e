//! Progress on stderr: a bar on a terminal, or else one line every 30 s.

use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::format_count;

/// Interval between progress lines if stderr is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Progress of one long operation. It uses no colour, so `NO_COLOR` needs no special case.
pub struct Progress {
    verb: &'static str,
    total: u64,
    output: ProgressOutput,
}

enum ProgressOutput {
    Bar(ProgressBar),
    Lines { last: Instant },
    Notes,
    Quiet,
}

impl Progress {
    /// Starts the progress display. `total` has the unit of [`Progress::update`], such as requests or optimizer
    /// steps.
    pub fn new(verb: &'static str, total: u64, quiet: bool) -> Self {
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
            bar.set_prefix(verb);
            ProgressOutput::Bar(bar)
        } else {
            ProgressOutput::Lines {
                last: Instant::now(),
            }
        };
        Self {
            verb,
            total,
            output,
        }
    }

    /// Shows notes only, for an operation inside another one that shows its own progress.
    pub fn notes(quiet: bool) -> Self {
        let output = if quiet {
            ProgressOutput::Quiet
        } else {
            ProgressOutput::Notes
        };
        Self {
            verb: "",
            total: 0,
            output,
        }
    }

    /// Shows that `done` of the total are done. `details` is only called if its text is shown; the text must be
    /// sanitised.
    pub fn update(&mut self, done: u64, details: impl FnOnce() -> String) {
        match &mut self.output {
            ProgressOutput::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(details());
            }
            ProgressOutput::Lines { last } if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                let (done, total) = (format_count(done), format_count(self.total));
                write_line(&format!("{}: {done} of {total}, {}", self.verb, details()));
            }
            ProgressOutput::Lines { .. } | ProgressOutput::Notes | ProgressOutput::Quiet => {}
        }
    }

    /// Prints a line above the bar immediately.
    pub fn note(&self, line: &str) {
        match &self.output {
            ProgressOutput::Bar(bar) => bar.suspend(|| write_line(line)),
            ProgressOutput::Lines { .. } | ProgressOutput::Notes => write_line(line),
            ProgressOutput::Quiet => {}
        }
    }
}

/// Progress of reading large files, shown only if it takes longer than 300 ms.
pub struct ReadProgress {
    verb: &'static str,
    quiet: bool,
    started: Instant,
    shown: Option<Progress>,
}

impl ReadProgress {
    const SHORT: Duration = Duration::from_millis(300);
    const MB: u64 = 1_000_000;

    pub fn new(verb: &'static str, quiet: bool) -> Self {
        Self {
            verb,
            quiet,
            started: Instant::now(),
            shown: None,
        }
    }

    /// Shows that `done` of `total` bytes have been read.
    pub fn update(&mut self, done: u64, total: u64) {
        if self.shown.is_none() && self.started.elapsed() < Self::SHORT {
            return;
        }
        let progress = self
            .shown
            .get_or_insert_with(|| Progress::new(self.verb, total / Self::MB, self.quiet));
        progress.update(done / Self::MB, || "MB".to_owned());
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
