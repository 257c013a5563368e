//! `unreadable/` in the run folder: response bodies that could not be parsed, saved for inspection. They are unchanged,
//! except that API keys are replaced.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

/// Maximum number of bodies without an answer that a run saves: the first ones of a broken endpoint show the problem.
const MAX_WITHOUT_ANSWER: usize = 100;

/// Saves the bodies. Clones share the count of saved bodies without an answer.
#[derive(Clone)]
pub(crate) struct UnreadableBodies {
    dir: PathBuf,
    without_answer: Arc<AtomicUsize>,
}

/// Returns the path of the folder.
pub(crate) fn dir(run_dir: &Path) -> PathBuf {
    run_dir.join("unreadable")
}

impl UnreadableBodies {
    pub(crate) fn new(run_dir: &Path) -> UnreadableBodies {
        UnreadableBodies {
            dir: dir(run_dir),
            without_answer: Arc::default(),
        }
    }

    /// Saves the body of a paid answer. Returns its file.
    pub(crate) fn save(&self, key: &str, body: &[u8]) -> Result<PathBuf> {
        crate::fs::create_dir_all(&self.dir)?;
        let file = self.dir.join(format!("{key}.body"));
        crate::fs::write_atomic(&file, body)?;
        Ok(file)
    }

    /// Saves a body without an answer, up to [`MAX_WITHOUT_ANSWER`] bodies. The body of a later attempt at the row
    /// replaces it.
    pub(crate) fn save_without_answer(&self, key: &str, body: &[u8]) {
        if body.trim_ascii().is_empty()
            || self.without_answer.fetch_add(1, Ordering::Relaxed) >= MAX_WITHOUT_ANSWER
        {
            return;
        }
        // The body is only for inspection, so the run continues without it.
        if let Err(error) = self.save(key, body) {
            tracing::debug!("{error:#}");
        }
    }
}
