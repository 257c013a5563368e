//! The end of a run: the books are closed, and the summary is written.

use anyhow::Result;

use super::Dispatcher;
use crate::client::attempt_error::RowFailure;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::harvest::{disk_full, run_error};
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, Line};
use crate::report::summary::HarvestSummary;

/// What is left of a dispatcher.
pub(crate) struct DispatchEnd {
    pub summary: HarvestSummary,
    pub upstreams: Vec<Upstream>,
    pub books: RunFiles,
}

impl Dispatcher<'_> {
    pub(super) fn finish(mut self) -> Result<DispatchEnd> {
        let synced = self.cache.sync();
        synced.map_err(|error| run_error::not_recorded(error, self.cache.safe_len()))?;
        self.check_cache()?;
        self.pass_time();
        let still_in_flight = (self.in_flight.len() + self.room.take().len()) as u64;
        let noted = self.note_suspects();
        self.excuse(noted)?;
        let closed = self.books.close(&mut self.upstreams, still_in_flight);
        self.excuse(closed)?;
        self.note_dollars();
        let mut summary = std::mem::take(&mut self.summary);
        summary.attempts_lost += still_in_flight;
        summary.pending = summary.total - summary.done();
        let max_attempts = self.config.retry.max_attempts;
        summary.given_up = self.books.given_up(&summary.failed_rows, max_attempts);
        summary.seconds = self.started.elapsed().as_secs_f64();
        summary.hours = std::mem::take(&mut self.timeline.hours);
        // An hour that the run only just touched.
        summary
            .hours
            .retain(|hour| hour.seconds > 0.0 || hour.requests > 0);
        let of_a_lane = self.upstreams.iter_mut().find_map(Upstream::take_error);
        let of_rows = summary.failed_rows_error(&self.config.run_dir);
        summary.error = self.stop.take().or(of_a_lane).or(of_rows);
        self.excuse(crate::report::write(&mut summary, &self.config.run_dir))?;
        Ok(DispatchEnd {
            summary,
            upstreams: self.upstreams,
            books: self.books,
        })
    }

    /// Notes the rows that the next run tries last.
    fn note_suspects(&mut self) -> Result<()> {
        for upstream in &self.upstreams {
            for row in upstream.suspects() {
                let failure = RowFailure::new("", "");
                let now = self.clock.now();
                let line = Line::new(
                    &self.plan,
                    QueuedRow::fresh(row),
                    Kind::Suspect,
                    &failure,
                    now,
                );
                let unanswered = &mut self.books.unanswered;
                if unanswered
                    .get(&line.key)
                    .is_none_or(|known| !known.is_suspect)
                {
                    unanswered.add(&line)?;
                }
            }
            let label = upstream.settings.teacher.label();
            let failed = self.summary.failed_rows.iter();
            for row in failed.filter(|row| upstream.has_succeeded() && row.teacher == label) {
                let known = self.books.unanswered.get(&row.key);
                if known.is_none_or(|known| known.failed_as != row.class) {
                    self.books.unanswered.add(&row.line(self.clock.now()))?;
                }
            }
        }
        Ok(())
    }

    /// Downgrades a write error to a warning if the disk is full or the folder was moved.
    fn excuse(&self, written: Result<()>) -> Result<()> {
        match written {
            Err(error) if self.is_displaced => {
                tracing::warn!("{error:#}");
                Ok(())
            }
            other => disk_full::excuse(other),
        }
    }
}
