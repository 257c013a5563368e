//! Handles a full disk: answers are held in memory and no request is sent until there is space again.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::time::Instant;

use crate::harvest::attempt::FinishedAttempt;
use crate::harvest::run_error;

/// Maximum time to wait for disk space before the run ends.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Pause between two attempts to write.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Returns true if the cause of the error is a full disk or an exceeded quota.
pub(crate) fn is_full(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|error: &std::io::Error| {
        matches!(
            error.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
        )
    })
}

/// Downgrades the error of a full disk to a warning, at the end of a run, when the write cannot be retried.
pub(crate) fn downgrade_if_full(result: anyhow::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if is_full(&error) => {
            tracing::warn!("{error:#}");
            Ok(())
        }
        other => other,
    }
}

/// Replies held in memory while the disk is full. Their number is bounded by the requests in flight, because no
/// request is sent while the disk is full.
#[derive(Default)]
pub(crate) struct HeldAnswers {
    replies: Vec<FinishedAttempt>,
    /// None if the disk is not full.
    wait: Option<DiskWait>,
}

/// A wait for disk space.
struct DiskWait {
    /// Time of the first failed write.
    since: Instant,
    /// Time of the next attempt to write.
    retry_at: Instant,
    /// Error of the first failed write.
    message: String,
}

impl HeldAnswers {
    /// Records that a write failed because the disk is full. Returns true at the first failure of a wait.
    pub(crate) fn record_failure(&mut self, error: &anyhow::Error) -> bool {
        let now = Instant::now();
        let is_new = self.wait.is_none();
        let wait = self.wait.get_or_insert_with(|| DiskWait {
            since: now,
            retry_at: now,
            message: format!("{error:#}"),
        });
        wait.retry_at = now + RETRY_PAUSE;
        is_new
    }

    /// Holds replies until the disk has space.
    pub(crate) fn hold(&mut self, group: Vec<FinishedAttempt>) {
        self.replies.extend(group);
    }

    pub(crate) fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.wait.is_some()
    }

    /// Returns the time of the next attempt to write; None if the disk is not full.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.wait.as_ref().map(|wait| wait.retry_at)
    }

    /// Removes and returns the held replies.
    pub(crate) fn take(&mut self) -> Vec<FinishedAttempt> {
        std::mem::take(&mut self.replies)
    }

    /// Handles the result of another attempt to save the account, after the attempt to write the held replies. Ends the
    /// wait and returns true if the disk has space again. Otherwise the next attempt follows after a pause.
    ///
    /// # Errors
    /// If the account cannot be saved for another reason than a full disk.
    pub(crate) fn saved_again(&mut self, saved: anyhow::Result<()>) -> anyhow::Result<bool> {
        match saved {
            Ok(()) if self.has_replies() => Ok(false),
            Ok(()) => {
                self.wait = None;
                Ok(true)
            }
            Err(error) if is_full(&error) => {
                self.record_failure(&error);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns true if the wait has lasted for [`MAX_WAIT`].
    pub(crate) fn has_timed_out(&self) -> bool {
        self.wait
            .as_ref()
            .is_some_and(|wait| wait.since.elapsed() >= MAX_WAIT)
    }

    /// Ends the wait although the disk is still full. Returns the held replies, which are lost, and the error that ends
    /// the run. `recorded` is the number of records in the cache. None if the disk is not full.
    pub(crate) fn give_up(
        &mut self,
        recorded: usize,
    ) -> Option<(Vec<FinishedAttempt>, anyhow::Error)> {
        let wait = self.wait.take()?;
        let replies = self.take();
        let answers = replies.iter().filter(|request| request.result.is_ok());
        let elapsed = wait.since.elapsed();
        let error = run_error::disk_full(elapsed, &wait.message, recorded, answers.count());
        Some((replies, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ledger_on_a_full_disk_is_saved_again_after_a_pause() {
        let full = || anyhow::Error::from(std::io::Error::from(ErrorKind::StorageFull));
        let mut held = HeldAnswers::default();
        assert!(held.record_failure(&full()));
        for _ in 0..3 {
            tokio::time::advance(RETRY_PAUSE).await;
            assert!(!held.saved_again(Err(full())).unwrap());
            assert_eq!(held.retry_at(), Some(Instant::now() + RETRY_PAUSE));
        }
        assert!(held.saved_again(Err(anyhow::anyhow!("broken"))).is_err());
        assert!(held.saved_again(Ok(())).unwrap());
        assert_eq!(held.retry_at(), None);
    }
}
