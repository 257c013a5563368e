//! [`MemoryGuard`]: ends the process if a template uses too much memory for one row.
//!
//! The template engine's fuel limits the number of steps, but a string that is appended to itself doubles at each step.
//! The engine has no memory limit and cannot be interrupted within an expression, so a thread watches the memory and
//! ends the process. No data is lost: prompts are rendered before the cache is opened and before any request.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::exit::Exit;
use crate::ops::process;

/// Maximum growth of the process's resident memory, in bytes, while one row is rendered.
const MAX_GROWTH_BYTES: u64 = 512 << 20;

/// Interval between two checks. Within it, a doubling string grows far less than the limit.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Value of [`MemoryGuard::row`] while no row is rendered.
const IDLE: u64 = 0;

/// Value of [`MemoryGuard::row`] that ends the watching thread.
const STOP: u64 = u64::MAX;

/// Watches the memory of the process while rows are rendered, until it is dropped.
pub(crate) struct MemoryGuard {
    /// `IDLE`, `STOP`, or 1 + the number of the row that is being rendered.
    row: Arc<AtomicU64>,
}

impl MemoryGuard {
    /// Starts the watching thread. The error message names `template`.
    pub(crate) fn new(template: &Path) -> MemoryGuard {
        let row = Arc::new(AtomicU64::new(IDLE));
        let watched = Arc::clone(&row);
        let template = template.to_owned();
        std::thread::spawn(move || watch(&watched, &template));
        MemoryGuard { row }
    }

    /// Calls `render`, which renders the row `number`, under the memory limit.
    pub(crate) fn watch_row<T>(&self, number: usize, render: impl FnOnce() -> T) -> T {
        self.row.store(number as u64 + 1, Ordering::Relaxed);
        let rendered = render();
        self.row.store(IDLE, Ordering::Relaxed);
        rendered
    }
}

impl Drop for MemoryGuard {
    fn drop(&mut self) {
        self.row.store(STOP, Ordering::Relaxed);
    }
}

fn watch(row: &AtomicU64, template: &Path) {
    let mut last_row = IDLE;
    let mut bytes_at_start = 0;
    loop {
        std::thread::sleep(CHECK_INTERVAL);
        let row = row.load(Ordering::Relaxed);
        // On a system that does not report the memory, there is nothing to watch.
        let Some(bytes) = process::resident_bytes() else {
            return;
        };
        match row {
            STOP => return,
            row if row == IDLE || row != last_row => {
                last_row = row;
                bytes_at_start = bytes;
            }
            row if bytes > bytes_at_start + MAX_GROWTH_BYTES => exit_over_limit(row - 1, template),
            _ => {}
        }
    }
}

fn exit_over_limit(number: u64, template: &Path) -> ! {
    let message = format!(
        "error: line or row {number} of the prompts: the template {} used more than {} MiB of memory for it: make \
         the rendered text shorter",
        template.display(),
        MAX_GROWTH_BYTES >> 20
    );
    // If stderr is closed, the exit status still reports the error.
    let _ = writeln!(std::io::stderr(), "{message}");
    std::process::exit(Exit::Usage(message).code().into());
}
