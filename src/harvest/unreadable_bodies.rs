//! `unreadable/` in the run folder: bodies that could not be read, as they came, for a look at them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

/// Bodies that are kept though nothing was paid for them, at most: of an endpoint that is out of order
/// the first ones say enough.
const MOST_UNPAID: usize = 100;

/// The folder, shared by all attempts.
#[derive(Clone)]
pub(crate) struct UnreadableBodies {
    dir: PathBuf,
    unpaid: Arc<AtomicUsize>,
}

/// The folder of a run.
pub(crate) fn dir(run_dir: &Path) -> PathBuf {
    run_dir.join("unreadable")
}

impl UnreadableBodies {
    pub(crate) fn new(run_dir: &Path) -> UnreadableBodies {
        UnreadableBodies {
            dir: dir(run_dir),
            unpaid: Arc::default(),
        }
    }

    /// Keeps the body of an answer that was paid for. Returns its file.
    pub(crate) fn keep(&self, key: &str, body: &[u8]) -> Result<PathBuf> {
        crate::fs::create_dir_all(&self.dir)?;
        let file = self.dir.join(format!("{key}.body"));
        crate::fs::write_atomic(&file, body)?;
        Ok(file)
    }

    /// Keeps one of the first bodies that hold no answer; a later attempt at the same row replaces it.
    pub(crate) fn keep_unpaid(&self, key: &str, body: &[u8]) {
        if body.trim_ascii().is_empty()
            || self.unpaid.fetch_add(1, Ordering::Relaxed) >= MOST_UNPAID
        {
            return;
        }
        // It is for a look at it, and the failure is told without it.
        if let Err(error) = self.keep(key, body) {
            tracing::debug!("{error:#}");
        }
    }
}
