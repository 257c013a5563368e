//! Reads results files over a connection that may break, and saves files that cannot be parsed.

use std::io::Write;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::StreamExt;

use super::rows::ResultRows;
use super::{BatchRun, BatchStepError};
use crate::client::attempt_error::AttemptError;
use crate::client::batch_object;
use crate::client::batch_object::FileLines;
use crate::client::outcome;
use crate::client::transport::{BatchApi, FileChunks, FileDownload};
use crate::harvest::{run_error, unreadable_bodies};

/// Number of failed reads of a part's results files after which the upstream stops.
const MAX_READ_FAILURES: u32 = 20;

/// Assumed maximum length of an API key in bytes, in any encoding.
const MAX_KEY_BYTES: usize = 16 << 10;

impl BatchRun<'_> {
    /// Opens a results file of the part `index`. Returns None if the endpoint has refused the file too often; earlier
    /// refusals are errors, so that the step is retried.
    pub(super) async fn rows_of_file(
        &mut self,
        index: usize,
        batches: &dyn BatchApi,
        file: &str,
    ) -> Result<Option<ResultRows>, BatchStepError> {
        let content = self.content_of_file(index, batches, file).await?;
        Ok(content.map(|chunks| ResultRows::new(FileLines::new(chunks))))
    }

    /// Starts the download of a results file. Returns None in the same case as [`Self::rows_of_file`].
    async fn content_of_file(
        &mut self,
        index: usize,
        batches: &dyn BatchApi,
        file: &str,
    ) -> Result<Option<FileChunks>, BatchStepError> {
        let error = match batches.content(file).await {
            Ok(FileDownload::Content(chunks)) => return Ok(Some(chunks)),
            Ok(FileDownload::Refused(reply)) => {
                let checked = batch_object::check(Ok(reply), self.clock.now().into());
                let error = checked.err();
                error.context("internal error: a refused download without an error")?
            }
            Err(error) => outcome::classify_transport_error(error),
        };
        match error {
            AttemptError::Refused(failure) => {
                self.retry_missing(index, &failure.message)?;
                Ok(None)
            }
            error => Err(self.read_failed(index, error)),
        }
    }

    /// Reads the next row of a results file; None after the last row.
    pub(super) async fn next_row(
        &mut self,
        index: usize,
        rows: &mut ResultRows,
    ) -> Result<Option<Bytes>, BatchStepError> {
        match rows.next().await {
            Ok(row) => Ok(row),
            Err(error) => Err(self.read_failed(index, outcome::classify_transport_error(error))),
        }
    }

    /// Counts a failed read of a results file. The outage limit does not bound these failures, because other requests
    /// may succeed meanwhile.
    fn read_failed(&mut self, index: usize, error: AttemptError) -> BatchStepError {
        let part_progress = &mut self.journal.parts[index].progress;
        part_progress.read_failures += 1;
        let count = part_progress.read_failures;
        let upstream = part_progress.upstream;
        let message = error.message().to_owned();
        if count == 1 {
            self.progress.note(&format!(
                "a results file cannot be read ({message}): requesting it again"
            ));
        } else if count >= MAX_READ_FAILURES
            && let Some(upstream) = upstream
        {
            self.upstreams[upstream].stop(run_error::results_not_read(count, &message));
        }
        error.into()
    }

    /// Saves a results file from which no row of the part can be parsed, and stops the upstream so that paid answers
    /// are not bought again. The next run reads the batch again.
    pub(super) async fn keep_unreadable_file(
        &mut self,
        index: usize,
        batches: &dyn BatchApi,
        file: &str,
    ) -> Result<(), BatchStepError> {
        let (upstream, _) = self.upstream_of(index)?;
        let folder = unreadable_bodies::dir(&self.settings.run_dir);
        crate::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}.results", self.journal.parts[index].nonce));
        let mut file_copy = crate::fs::AtomicFile::create(&path)?;
        let Some(mut pieces) = self.content_of_file(index, batches, file).await? else {
            let count = self.journal.parts[index].progress.not_found;
            let error = run_error::results_not_read(count, "the endpoint no longer finds it");
            self.upstreams[upstream].stop(error);
            return Ok(());
        };
        let context = "could not save a results file";
        let mut buffer = Vec::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| {
                self.read_failed(index, outcome::classify_transport_error(error))
            })?;
            buffer.extend_from_slice(&piece);
            buffer = batches.without_key(buffer.into()).into();
            // An API key may span two pieces, so the last bytes are written only with the next piece.
            let writable_bytes = buffer.len().saturating_sub(MAX_KEY_BYTES);
            file_copy
                .write_all(&buffer[..writable_bytes])
                .context(context)?;
            buffer.drain(..writable_bytes);
        }
        file_copy.write_all(&buffer).context(context)?;
        file_copy.commit(true)?;
        self.upstreams[upstream].stop(run_error::unreadable_results(&path));
        Ok(())
    }
}
