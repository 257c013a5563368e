//! A full disk: answers wait in memory until there is room again, and nothing more is asked.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::time::Instant;

use crate::harvest::attempt::FinishedAttempt;
use crate::harvest::run_error;

/// For how long room is waited for.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// The pause between two tries.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Does the error come from a full disk, which somebody may make room on?
pub(crate) fn is_full(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|error: &std::io::Error| {
        matches!(
            error.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded
        )
    })
}

/// At the end of a run that a full disk has ended: what cannot be written is told, and no more.
pub(crate) fn downgrade_if_full(result: anyhow::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if is_full(&error) => {
            tracing::warn!("{error:#}");
            Ok(())
        }
        other => other,
    }
}

/// What waits for room. It is bounded by what may be in flight, since nothing is sent meanwhile.
#[derive(Default)]
pub(crate) struct HeldAnswers {
    held: Vec<FinishedAttempt>,
    full: Option<Full>,
}

struct Full {
    since: Instant,
    retry_at: Instant,
    message: String,
}

impl HeldAnswers {
    /// The disk is full; true if that is new.
    pub(crate) fn note(&mut self, error: &anyhow::Error) -> bool {
        let now = Instant::now();
        let is_new = self.full.is_none();
        let full = self.full.get_or_insert_with(|| Full {
            since: now,
            retry_at: now,
            message: format!("{error:#}"),
        });
        full.retry_at = now + RETRY_PAUSE;
        is_new
    }

    /// Keeps what could not be recorded.
    pub(crate) fn hold(&mut self, group: Vec<FinishedAttempt>) {
        self.held.extend(group);
    }

    pub(crate) fn holds_something(&self) -> bool {
        !self.held.is_empty()
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.full.is_some()
    }

    /// When to try again.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.full.as_ref().map(|full| full.retry_at)
    }

    /// What to try again with.
    pub(crate) fn take(&mut self) -> Vec<FinishedAttempt> {
        std::mem::take(&mut self.held)
    }

    /// There is room.
    pub(crate) fn clear(&mut self) {
        self.full = None;
    }

    pub(crate) fn has_waited_long(&self) -> bool {
        self.full
            .as_ref()
            .is_some_and(|full| full.since.elapsed() >= MAX_WAIT)
    }

    /// Waits no longer. Returns the answers that are lost, and why the run ends; `safe` is the number
    /// of records in the cache.
    pub(crate) fn give_up(&mut self, safe: usize) -> Option<(Vec<FinishedAttempt>, anyhow::Error)> {
        let full = self.full.take()?;
        let held = self.take();
        let lost = held.iter().filter(|request| request.result.is_ok()).count();
        let error = run_error::disk_full(full.since.elapsed(), &full.message, safe, lost);
        Some((held, error))
    }
}
