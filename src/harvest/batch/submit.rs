//! Submits waiting rows: plans a part, uploads its file and creates its batch.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::time::Instant;

use super::journal::{BatchPart, PartProgress, PartState};
use super::parts::{self, PartFull, PartLimits, RowSize};
use super::upstream::batches;
use super::{BatchRun, BatchStepError};
use crate::budget::account::Charge;
use crate::budget::dollars::Dollars;
use crate::client::attempt_error::{AttemptError, RowFailure};
use crate::client::batch_object;
use crate::client::batch_object::{BatchObject, ENDPOINT};
use crate::client::transport::Transport;
use crate::plan::queue::QueuedRow;

/// Delay in seconds before each search for a batch whose creation had no reply. A new batch may be listed late.
const LOOKUP_DELAYS_S: [u64; 4] = [0, 5, 15, 40];

/// Numbers of "not found" replies for an uploaded file. After the first number, the file is uploaded again; after more
/// than the second, the upstream stops.
const FILE_NOT_FOUND_LIMITS: [u32; 2] = [6, 12];

/// Maximum clock skew in seconds: the search for a nonce covers batches created up to this long before its part.
const CLOCK_SKEW_S: i64 = 86_400;

impl BatchRun<'_> {
    /// Fails the leading rows that exceed the maximum file size. Then makes a part of the first waiting rows that fit,
    /// and returns its index. None if no row fits now.
    pub(super) fn plan_part(&mut self, upstream: usize) -> Result<Option<usize>> {
        self.fail_too_large_rows(upstream);
        let sizes: Vec<RowSize> = {
            let waiting = self.upstreams[upstream].waiting.iter();
            // One more row shows whether the part is full.
            waiting
                .take(self.settings.batch.max_requests + 1)
                .map(|entry| self.size(upstream, entry.row))
                .collect()
        };
        let enqueued_tokens: u64 = self
            .parts_of(upstream)
            .into_iter()
            .map(|index| self.journal.parts[index].tokens)
            .sum();
        let first_tokens = sizes.first().map_or(0, |size| size.tokens);
        let tokens = self.upstreams[upstream].token_limit.map(|limit| {
            let available = limit.saturating_sub(enqueued_tokens);
            // If nothing is enqueued, one row is always tried, because the token count is an estimate.
            if enqueued_tokens == 0 {
                available.max(first_tokens)
            } else {
                available
            }
        });
        let limits = PartLimits::new(
            &self.settings.batch,
            tokens,
            self.run_files.account.remaining().usd(),
        );
        let (count, sum, full) = limits.fit(sizes.iter().copied());
        if count == 0 {
            if full == Some(PartFull::Budget) {
                self.stop_without_budget(upstream);
            }
            return Ok(None);
        }
        let entries: Vec<(QueuedRow, f64)> = self.upstreams[upstream]
            .waiting
            .drain(..count)
            .zip(sizes.iter().map(|size| size.usd))
            .collect();
        let nonce = format!("{:032x}", fastrand::u128(..));
        self.journal
            .write_rows(&nonce, &self.plan, upstream, &entries)?;
        let settings = &self.upstreams[upstream].settings;
        self.journal.parts.push(BatchPart {
            nonce,
            teacher: settings.teacher.label().into(),
            endpoint: crate::config::teacher::identity(&settings.teacher).into(),
            rows: count as u64,
            tokens: sum.tokens,
            reserved_usd: sum.usd,
            planned_at: self.clock.now().as_second(),
            state: PartState::Planned,
            progress: PartProgress {
                upstream: Some(upstream),
                rows: entries
                    .iter()
                    .map(|(entry, _)| Some(entry.row as u32))
                    .collect(),
                unsettled_usd: sum.usd,
                ..PartProgress::default()
            },
        });
        self.run_files
            .account
            .hold_for_batch(Dollars::at_least(sum.usd));
        self.journal.save()?;
        Ok(Some(self.journal.parts.len() - 1))
    }

    fn size(&self, upstream: usize, row: usize) -> RowSize {
        let bound = self.plan.bound(upstream, row);
        let price = &self.plan.templates[upstream].endpoint.price;
        parts::size(
            &self.plan,
            upstream,
            row,
            self.run_files.account.bound(&bound, price).usd.usd(),
        )
    }

    /// Fails the leading waiting rows that exceed the maximum file size even as the only row of a part.
    fn fail_too_large_rows(&mut self, upstream: usize) {
        let max_bytes = parts::max_file_bytes(&self.settings.batch);
        while let Some(entry) = self.upstreams[upstream].waiting.front().copied() {
            let bytes = self.size(upstream, entry.row).bytes;
            if bytes <= max_bytes {
                return;
            }
            self.upstreams[upstream].waiting.pop_front();
            let message = format!(
                "a request of {bytes} bytes is larger than `batch.max_megabytes` = {}",
                self.settings.batch.max_megabytes
            );
            self.fail(upstream, entry, RowFailure::new("over the limit", &message));
        }
    }

    /// Stops the upstream because the budget is used up, unless a part that has not ended may still release budget.
    fn stop_without_budget(&mut self, upstream: usize) {
        let mut running = self
            .upstreams
            .iter()
            .filter(|upstream| !upstream.is_stopped());
        if running.any(|upstream| !self.parts_of(upstream.index).is_empty()) {
            return;
        }
        let error = crate::budget::account::budget_exhausted(&self.run_files.account);
        self.upstreams[upstream].stop(error);
    }

    /// Advances a part until its batch is created or the part has to wait. If `may_send` is false, uploads no file and
    /// creates no batch.
    pub(super) async fn submit(
        &mut self,
        index: usize,
        may_send: bool,
    ) -> Result<(), BatchStepError> {
        loop {
            let part = &self.journal.parts[index];
            if part
                .progress
                .not_before
                .is_some_and(|until| until > Instant::now())
            {
                return Ok(());
            }
            let is_past_deadline = self.deadline_passed_at.is_some();
            match part.state.clone() {
                PartState::Creating { file } if part.progress.is_creation_unconfirmed => {
                    self.find_batch(index, file).await?
                }
                PartState::Planned | PartState::Uploaded { .. } | PartState::Creating { .. }
                    if is_past_deadline =>
                {
                    self.return_rows(index)?;
                }
                _ if !may_send => return Ok(()),
                PartState::Planned => self.upload(index).await?,
                PartState::Uploaded { file } => {
                    self.journal.set(index, PartState::Creating { file })?
                }
                PartState::Creating { file } => self.create(index, file).await?,
                PartState::Created { .. }
                | PartState::Cancelling { .. }
                | PartState::Done { .. } => {
                    return Ok(());
                }
            }
        }
    }

    async fn upload(&mut self, index: usize) -> Result<(), BatchStepError> {
        let path = self.journal.requests(&self.journal.parts[index].nonce);
        let (upstream, transport) = self.upstream_of(index)?;
        let reply = batches(&transport)?.upload(&path).await;
        let reply = batch_object::check(reply, self.clock.now().into())?;
        let file = batch_object::parse_file_id(&reply.body).ok_or_else(|| {
            crate::client::attempt_error::possibly_billed(
                "malformed",
                "the reply to an upload names no file",
            )
        })?;
        self.upstreams[upstream].success();
        Ok(self.journal.set(index, PartState::Uploaded { file })?)
    }

    async fn create(&mut self, index: usize, file: String) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.upstream_of(index)?;
        let body = json!({
            "input_file_id": file,
            "endpoint": ENDPOINT,
            "completion_window": self.settings.batch.completion_window,
            "metadata": {"nonce": self.journal.parts[index].nonce},
        });
        // Until the reply arrives, the batch may or may not exist.
        let progress = &mut self.journal.parts[index].progress;
        progress.is_creation_unconfirmed = true;
        progress.lookups = 0;
        let reply = batches(&transport)?.create(&body).await;
        let progress = &mut self.journal.parts[index].progress;
        let reply = match batch_object::check(reply, self.clock.now().into()) {
            Ok(reply) => reply,
            Err(AttemptError::Refused(failure))
                if is_file_missing(&failure)
                    && progress.input_not_found < FILE_NOT_FOUND_LIMITS[1] =>
            {
                progress.is_creation_unconfirmed = false;
                progress.input_not_found += 1;
                // 1 s the first time, doubled each time up to 32 s.
                let pause = Duration::from_millis(500 << progress.input_not_found.min(6));
                progress.not_before = Some(Instant::now() + pause);
                let state = if progress.input_not_found == FILE_NOT_FOUND_LIMITS[0] {
                    PartState::Planned
                } else {
                    PartState::Uploaded { file }
                };
                return Ok(self.journal.set(index, state)?);
            }
            Err(error) => {
                // A refusal creates no batch. A connection may have broken after the batch was created.
                progress.is_creation_unconfirmed = matches!(&error, AttemptError::Transient { failure, .. } if !failure.is_unreachable);
                if !progress.is_creation_unconfirmed {
                    self.journal.set(index, PartState::Uploaded { file })?;
                }
                return Err(error.into());
            }
        };
        self.upstreams[upstream].success();
        self.upstreams[upstream].has_batches = true;
        match BatchObject::parse(&reply.body) {
            Some(object) => self.created(index, object),
            None => Err(crate::client::attempt_error::possibly_billed(
                "malformed",
                "the reply to a creation names no batch",
            )
            .into()),
        }
    }

    /// Records that the batch of a part exists.
    fn created(&mut self, index: usize, object: BatchObject) -> Result<(), BatchStepError> {
        let batch = object.id;
        self.journal.set(index, PartState::Created { batch })?;
        let part = &mut self.journal.parts[index];
        part.progress.is_creation_unconfirmed = false;
        part.progress.status = object.status;
        self.summary.requests += part.rows;
        Ok(())
    }

    /// Searches for a batch whose creation had no reply. If the last search, a minute after the first, does not find
    /// the batch, it is created again.
    async fn find_batch(&mut self, index: usize, file: String) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.upstream_of(index)?;
        let part = &self.journal.parts[index];
        let nonce = part.nonce.clone();
        let oldest = part.planned_at - CLOCK_SKEW_S;
        let mut after: Option<String> = None;
        loop {
            let reply = batches(&transport)?.list(after.as_deref()).await;
            let reply = batch_object::check(reply, self.clock.now().into())?;
            let (objects, has_more) = batch_object::parse_page(&reply.body).ok_or_else(|| {
                crate::client::attempt_error::possibly_billed(
                    "malformed",
                    "the reply is not a list of batches",
                )
            })?;
            self.upstreams[upstream].success();
            let last_id = objects.last().map(|object| object.id.clone());
            // An endpoint that ignores `after` returns the same page again and again.
            let is_repeated = last_id == after;
            after = last_id;
            let is_last = !has_more
                || is_repeated
                || objects
                    .last()
                    .is_none_or(|object| object.created_at.is_some_and(|at| at < oldest));
            if let Some(object) = objects.into_iter().find(|object| object.nonce == nonce) {
                self.counts.adopted += 1;
                return self.created(index, object);
            }
            if is_last {
                break;
            }
        }
        let progress = &mut self.journal.parts[index].progress;
        progress.lookups += 1;
        match LOOKUP_DELAYS_S.get(progress.lookups) {
            Some(&pause) => {
                progress.not_before = Some(Instant::now() + Duration::from_secs(pause));
            }
            None => {
                progress.is_creation_unconfirmed = false;
                self.journal.set(index, PartState::Uploaded { file })?;
            }
        }
        Ok(())
    }

    /// Ends a part that has no batch and returns its rows to the queue.
    fn return_rows(&mut self, index: usize) -> Result<(), BatchStepError> {
        let (upstream, _) = self.upstream_of(index)?;
        let rows = self.journal.parts[index].progress.rows.iter().flatten();
        let entries: Vec<QueuedRow> = rows.map(|&row| QueuedRow::fresh(row as usize)).collect();
        self.upstreams[upstream].waiting.extend(entries);
        self.end_part(index, "never sent")
    }

    /// Ends a part and releases its remaining reservation.
    pub(super) fn end_part(&mut self, index: usize, status: &str) -> Result<(), BatchStepError> {
        let (upstream, _) = self.upstream_of(index)?;
        let price = self.upstreams[upstream].settings.price.clone();
        let part = &mut self.journal.parts[index];
        let unsettled = Dollars::at_least(std::mem::take(&mut part.progress.unsettled_usd));
        let rows = part.rows;
        self.run_files
            .account
            .settle_batch(unsettled, unsettled, rows, Charge::Nothing, &price)?;
        // The answers and the account are written first, because later runs do not read a part that has ended.
        self.cache.sync()?;
        self.run_files.account.tick()?;
        *self.counts.parts.entry(status.to_owned()).or_default() += 1;
        Ok(self.journal.end(index, status)?)
    }

    /// Returns the upstream of a part.
    ///
    /// # Errors
    /// If its teacher is not in the config; such parts are never advanced.
    pub(super) fn upstream_of(&self, index: usize) -> Result<(usize, Arc<dyn Transport>)> {
        let upstream = self.journal.parts[index].progress.upstream;
        let upstream =
            upstream.context("internal error: the teacher of a batch is not in the config")?;
        Ok((upstream, Arc::clone(&self.upstreams[upstream].transport)))
    }
}

/// Returns true if the endpoint does not find the input file. A new file may not be visible yet.
fn is_file_missing(failure: &RowFailure) -> bool {
    let message = failure.message.to_lowercase();
    message.contains("file") && (message.contains("no such") || message.contains("not found"))
}
