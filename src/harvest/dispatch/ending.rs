//! End of a run: closes the run files and writes the summary.

use anyhow::Result;

use super::Dispatcher;
use crate::client::attempt_error::RowFailure;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::harvest::{disk_full, run_error};
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, UnansweredLine};
use crate::report::summary::HarvestSummary;

/// Result of a dispatcher: the summary, and the state that another dispatcher can reuse.
pub(crate) struct DispatchEnd {
    pub summary: HarvestSummary,
    pub upstreams: Vec<Upstream>,
    pub run_files: RunFiles,
}

impl Dispatcher<'_> {
    /// Closes the run files and writes the summary. Requests still in flight, and replies still held because the disk
    /// is full, count as lost attempts.
    pub(super) fn finish(mut self) -> Result<DispatchEnd> {
        self.cache
            .sync()
            .map_err(|error| run_error::not_recorded(error, self.cache.intact_len()))?;
        self.check_cache()?;
        self.record_time();
        let lost_at_end = (self.in_flight.len() + self.held_answers.take().len()) as u64;
        let written = self.record_unanswered();
        self.downgrade_write_error(written)?;
        let closed = self.run_files.close(&mut self.upstreams, lost_at_end);
        self.downgrade_write_error(closed)?;
        self.update_costs();
        let mut summary = std::mem::take(&mut self.summary);
        summary.attempts_lost += lost_at_end;
        summary.pending = summary.total - summary.done();
        let max_attempts = self.settings.retry.max_attempts;
        summary.given_up = self.run_files.given_up(&summary.failed_rows, max_attempts);
        summary.seconds = self.started.elapsed().as_secs_f64();
        summary.hours = std::mem::take(&mut self.timeline.hours);
        // Drop hours in which nothing happened.
        summary
            .hours
            .retain(|hour| hour.seconds > 0.0 || hour.requests > 0);
        let upstream_error = self.upstreams.iter_mut().find_map(Upstream::take_error);
        let rows_error = summary.failed_rows_error(&self.settings.run_dir);
        summary.error = self.stop.take().or(upstream_error).or(rows_error);
        self.downgrade_write_error(crate::report::write(&mut summary, &self.settings.run_dir))?;
        Ok(DispatchEnd {
            summary,
            upstreams: self.upstreams,
            run_files: self.run_files,
        })
    }

    /// Records the suspect rows, which the next run sends last. For endpoints that have answered, also records the
    /// failed rows, except those that are already recorded with the same error class.
    fn record_unanswered(&mut self) -> Result<()> {
        for upstream in &self.upstreams {
            for row in upstream.suspects() {
                let failure = RowFailure::new("", "");
                let now = self.clock.now();
                let line = UnansweredLine::new(
                    &self.plan,
                    QueuedRow::fresh(row),
                    Kind::Suspect,
                    &failure,
                    now,
                );
                let unanswered = &mut self.run_files.unanswered;
                if unanswered
                    .get(&line.key)
                    .is_none_or(|history| !history.is_suspect)
                {
                    unanswered.add(&line)?;
                }
            }
            let label = upstream.settings.teacher.label();
            let failed = self.summary.failed_rows.iter();
            for row in failed.filter(|row| upstream.has_succeeded() && row.teacher == label) {
                let history = self.run_files.unanswered.get(&row.key);
                if history.is_none_or(|history| history.failed_as != row.class) {
                    self.run_files.unanswered.add(&row.line(self.clock.now()))?;
                }
            }
        }
        Ok(())
    }

    /// Downgrades a write error to a warning if the disk is full, or if another process has moved or changed the files
    /// of the cache.
    fn downgrade_write_error(&self, written: Result<()>) -> Result<()> {
        match written {
            Err(error) if self.is_displaced => {
                tracing::warn!("{error:#}");
                Ok(())
            }
            other => disk_full::downgrade_if_full(other),
        }
    }
}
