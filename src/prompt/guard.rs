//! [`MemoryGuard`]: limits the memory that a template may use for one row.
//!
//! The fuel limits the number of steps, but a text that is joined to itself doubles at each step. The template
//! engine has no memory limit and cannot be interrupted within an expression, so the guard ends the process. No
//! data is lost: prompts are rendered before the cache is opened and before any request.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::exit::Exit;
use crate::ops::process;

/// Maximum growth of the process in bytes while one row is rendered.
const MAX_GROWTH: u64 = 512 << 20;

/// Interval between two checks, in which a doubling text grows far less than the limit.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Value of the counter while no row is rendered.
const IDLE: u64 = 0;

/// Value of the counter that ends the watching thread.
const STOP: u64 = u64::MAX;

/// Watches the memory of the process while rows are rendered, until it is dropped.
pub(crate) struct MemoryGuard {
    /// Number of the row that is being rendered, counted from 1.
    row: Arc<AtomicU64>,
}

impl MemoryGuard {
    /// Starts the watching thread; `template` is for the error message.
    pub(crate) fn new(template: &Path) -> MemoryGuard {
        let row = Arc::new(AtomicU64::new(IDLE));
        let watched = Arc::clone(&row);
        let template = template.to_owned();
        std::thread::spawn(move || watch(&watched, &template));
        MemoryGuard { row }
    }

    /// Renders the row with this number under the memory limit.
    pub(crate) fn watch_row<T>(&self, row: usize, render: impl FnOnce() -> T) -> T {
        self.row.store(row as u64 + 1, Ordering::Relaxed);
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
    let mut last = (IDLE, 0);
    loop {
        std::thread::sleep(CHECK_INTERVAL);
        let (now, Some(bytes)) = (row.load(Ordering::Relaxed), process::resident_bytes()) else {
            return;
        };
        match now {
            STOP => return,
            IDLE => last = (IDLE, bytes),
            // A new row: it starts from the current memory.
            row if row != last.0 => last = (row, bytes),
            row if bytes > last.1 + MAX_GROWTH => exit_over_limit(row, template),
            _ => {}
        }
    }
}

fn exit_over_limit(row: u64, template: &Path) -> ! {
    let message = format!(
        "error: row {}: the template {} renders it to more than {} MiB of text",
        row - 1,
        template.display(),
        MAX_GROWTH >> 20
    );
    // If stderr is closed, the exit status still reports the error.
    let _ = writeln!(std::io::stderr(), "{message}");
    std::process::exit(Exit::Usage(message).code().into());
}
