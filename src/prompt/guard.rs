//! Bounds the memory that a template may take for one row.
//!
//! Fuel bounds the steps of a template, and a text that is joined to itself doubles at each step. The engine
//! has no bound for that, and nothing can stop it in the middle of an expression; so the process ends. That
//! is early: prompts are rendered before anything is opened or asked.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::exit::Exit;
use crate::ops::process;

/// Growth of the process in bytes while one row is rendered.
const MOST: u64 = 512 << 20;

/// Time between two looks: a text that doubles grows by far less.
const EVERY: Duration = Duration::from_millis(5);

/// No row is being rendered.
const IDLE: u64 = 0;

/// The last value of the counter.
const OVER: u64 = u64::MAX;

/// Watches the memory of the process while rows are rendered, until it is dropped.
pub(crate) struct MemoryGuard {
    /// Number of the row that is being rendered, counted from 1.
    row: Arc<AtomicU64>,
}

impl MemoryGuard {
    /// `template` is named where it takes too much.
    pub(crate) fn new(template: &Path) -> MemoryGuard {
        let row = Arc::new(AtomicU64::new(IDLE));
        let (watched, template) = (Arc::clone(&row), template.to_owned());
        std::thread::spawn(move || watch(&watched, &template));
        MemoryGuard { row }
    }

    /// Renders the row with this number.
    pub(crate) fn watch_row<T>(&self, row: usize, render: impl FnOnce() -> T) -> T {
        self.row.store(row as u64 + 1, Ordering::Relaxed);
        let rendered = render();
        self.row.store(IDLE, Ordering::Relaxed);
        rendered
    }
}

impl Drop for MemoryGuard {
    fn drop(&mut self) {
        self.row.store(OVER, Ordering::Relaxed);
    }
}

fn watch(row: &AtomicU64, template: &Path) {
    let mut last = (IDLE, 0);
    loop {
        std::thread::sleep(EVERY);
        let (now, Some(bytes)) = (row.load(Ordering::Relaxed), process::resident()) else {
            return;
        };
        match now {
            OVER => return,
            IDLE => last = (IDLE, bytes),
            // Several rows in between are none that grows without end.
            row if row != last.0 => last = (row, bytes),
            row if bytes > last.1 + MOST => exit_over_limit(row, template),
            _ => {}
        }
    }
}

fn exit_over_limit(row: u64, template: &Path) -> ! {
    let message = format!(
        "error: row {}: the template {} makes texts of more than {} MiB of it",
        row - 1,
        template.display(),
        MOST >> 20
    );
    // Where nobody can read it, the exit status still says so.
    let _ = writeln!(std::io::stderr(), "{message}");
    std::process::exit(Exit::Usage(message).code().into());
}
