//! Writes answers to the cache, or holds them in memory while the disk is full.

use anyhow::Result;
use tokio::time::Instant;

use super::Dispatcher;
use crate::exit::Exit;
use crate::harvest::attempt::FinishedAttempt;
use crate::harvest::{disk_full, run_error};

impl Dispatcher<'_> {
    /// Records the answers of a group by one write and settles every reply.
    pub(super) fn record(&mut self, finished: Vec<FinishedAttempt>) -> Result<()> {
        let answers = finished
            .iter()
            .filter_map(|request| request.result.as_ref().ok());
        let appended = self
            .cache
            .append_group(answers.map(|answered| &answered.encoded));
        match appended {
            Ok(()) => finished
                .into_iter()
                .try_for_each(|request| self.settle(request)),
            Err(error) if disk_full::is_full(&error) => {
                self.held_answers.hold(finished);
                self.note_full_disk(&error);
                Ok(())
            }
            Err(error) => Err(run_error::not_recorded(error, self.cache.intact_len())),
        }
    }

    /// Begins or extends the wait for disk space after a failed write.
    pub(super) fn note_full_disk(&mut self, error: &anyhow::Error) {
        if self.held_answers.record_failure(error) {
            self.progress.note(&format!(
                "{error:#}: answers are held in memory and no request is sent until there is disk space"
            ));
        }
    }

    /// Tries again to write the held answers. Returns the time of the next attempt if the disk is still full.
    pub(super) fn wait_for_disk_space(&mut self) -> Result<Option<Instant>> {
        let Some(retry_at) = self.held_answers.retry_at() else {
            return Ok(None);
        };
        // A run that is ending does not wait, but makes one last attempt.
        let is_last = self.stop.is_some() && self.in_flight.is_empty();
        if !is_last && Instant::now() < retry_at {
            return Ok(Some(retry_at));
        }
        let replies = self.held_answers.take();
        self.record(replies)?;
        let saved = self.run_files.account.save();
        if self.held_answers.saved_again(saved)? {
            self.progress.note("the disk has space again");
            return Ok(None);
        }
        if (is_last || self.held_answers.has_timed_out())
            && let Some((lost, error)) = self.held_answers.give_up(self.cache.intact_len())
        {
            self.summary.attempts_lost += lost.len() as u64;
            // The exit status is still that of the signal; the message reports the lost answers.
            let signal = self.stop.as_ref().and_then(Exit::signal_of);
            self.stop = Some(match signal {
                Some(number) => {
                    anyhow::Error::from(Exit::Signal(number)).context(format!("{error:#}"))
                }
                None => error,
            });
        }
        Ok(self.held_answers.retry_at())
    }
}
