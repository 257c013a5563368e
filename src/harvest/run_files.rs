//! Files that a run writes next to the cache: budget account, daily request counts, unanswered rows.

use std::path::Path;

use anyhow::Result;
use jiff::Timestamp;
use tokio::time::Instant;

use crate::budget::account::{Account, Reservation};
use crate::budget::dollars::Dollars;
use crate::budget::ledger;
use crate::budget::ledger::ReadOnlyLedger;
use crate::budget::ledger::{InFlight, Ledger, LedgerFiles, LedgerStore, Spent, UnpricedTokens};
use crate::cache;
use crate::cache::usage::Usage;
use crate::clock::WallClock;
use crate::config;
use crate::config::{EndpointConfig, Price};
use crate::harvest::upstream::Upstream;
use crate::plan::prepare::check_budget;
use crate::plan::run_settings::RunSettings;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, RowStatus};
use crate::rate_limit::daily::DailyLimit;
use crate::report::failures::FailedRow;
use crate::report::summary::HarvestSummary;

/// Budget account and unanswered rows of a run, open for writing.
pub(crate) struct RunFiles {
    pub account: Account<LedgerFiles>,
    pub unanswered: Unanswered,
    clock: WallClock,
}

impl RunFiles {
    /// Opens the budget account of the run folder. `unanswered` may belong to another folder. `cached_usd` is the cost
    /// of the cached records. Returns the run files, and the requests that a killed run left in flight. These count as
    /// possibly billed.
    ///
    /// # Errors
    /// If another process has the account open, or its files are damaged or cannot be written.
    pub(crate) fn open(
        settings: &RunSettings,
        cached_usd: f64,
        unanswered: Unanswered,
        clock: WallClock,
    ) -> Result<(RunFiles, InFlight)> {
        let (files, ledger, is_complete) = LedgerFiles::open(&settings.run_dir)?;
        let (account, left_in_flight) = account(settings, files, ledger, is_complete, cached_usd)?;
        let run_files = RunFiles {
            account,
            unanswered,
            clock,
        };
        Ok((run_files, left_in_flight))
    }

    /// Reserves the cost of batches under way, which a command outside batch mode must leave in the budget.
    pub(crate) fn hold_for_batches(&mut self, usd: f64) {
        self.account.hold_for_batch(Dollars::at_least(usd));
    }

    /// Returns the daily limit of the endpoint, with the requests that earlier runs sent.
    pub(crate) fn daily_limit(&mut self, upstream: &config::EndpointConfig) -> DailyLimit {
        daily_limit(&mut self.account, upstream, self.clock.now())
    }

    /// Returns an error if the most expensive request of an upstream exceeds the budget.
    pub(crate) fn check_largest(&self, plan: &Plan, upstream: usize) -> Result<()> {
        let price = &plan.templates[upstream].endpoint.price;
        check_budget(plan, upstream, self.account.cap(), |bound| {
            self.account.bound(bound, price).usd
        })
    }

    /// Reserves the amount for a request. Returns false if the budget does not cover the amount. With a daily limit,
    /// the request counts are written before the request is sent. After an error nothing is reserved.
    pub(crate) fn reserve(
        &mut self,
        amount: &Reservation,
        upstream: &mut Upstream,
    ) -> Result<bool> {
        if !self.account.reserve(amount)? {
            return Ok(false);
        }
        if upstream.limiter.daily_limit.must_write_ledger() {
            self.record_daily_requests(upstream, false);
            if let Err(error) = self.account.save() {
                self.account.release(amount);
                return Err(error);
            }
        }
        Ok(true)
    }

    /// Copies the request counts of the last 24 hours to the ledger.
    fn record_daily_requests(&mut self, upstream: &mut Upstream, is_closing: bool) {
        let now = self.clock.now();
        let slots = upstream
            .limiter
            .daily_limit
            .ledger_slots(Instant::now(), is_closing);
        if slots.is_empty() {
            return;
        }
        let time_of = |age_s: i64| Timestamp::from_second(now.as_second() - age_s).unwrap_or(now);
        let slots = slots
            .into_iter()
            .map(|(age_s, count)| (time_of(age_s), count));
        let label = upstream.settings.teacher.label().to_owned();
        self.account.daily_requests().insert(label, slots.collect());
    }

    /// Closes the account. Requests that are still in flight, for example after a second signal, count as possibly
    /// billed.
    pub(crate) fn close(&mut self, upstreams: &mut [Upstream], still_in_flight: u64) -> Result<()> {
        for upstream in upstreams {
            self.record_daily_requests(upstream, true);
        }
        self.account.close(still_in_flight)
    }

    /// Copies the budget to the summary, and, if an endpoint has prices, the amounts spent in US dollars.
    pub(crate) fn summarise<'a>(
        &self,
        mut prices: impl Iterator<Item = &'a Price>,
        summary: &mut HarvestSummary,
    ) {
        if prices.any(|price| price.input.is_some() && price.output.is_some()) {
            let spent = self.account.spent_by_process();
            summary.cost_usd = Some(spent.measured_usd.usd());
            summary.estimated_usd = Some(spent.estimated_usd.usd());
            summary.run_folder_usd = Some(self.account.spent().total().usd());
        }
        summary.budget_usd = self.account.cap().map(Dollars::usd);
    }

    /// Counts the failed rows that later runs request only with `--again`.
    pub(crate) fn given_up(&self, rows: &[FailedRow], max_attempts: u32) -> u64 {
        let row_status =
            |row: &&FailedRow| self.unanswered.row_status(&row.key, false, max_attempts);
        let given_up = |row: &&FailedRow| row_status(row) == RowStatus::GivenUp;
        rows.iter().filter(given_up).count() as u64
    }
}

/// Reads the account of the run folder without locking it. Without a budget, its spent amount may leave out tokens that
/// only the caches record, because reading all records of a large cache takes seconds.
///
/// # Errors
/// If its files are damaged.
pub(crate) fn open_read_only(
    settings: &RunSettings,
    cached_usd: f64,
) -> Result<Account<ReadOnlyLedger>> {
    let (ledger, is_complete) = ledger::read_only(&settings.run_dir)?;
    let is_enough = is_complete || settings.budget_usd.is_none();
    let (account, _) = account(settings, ReadOnlyLedger, ledger, is_enough, cached_usd)?;
    Ok(account)
}

/// Opens the account stored in `store`. `is_complete` is the flag returned by [`LedgerFiles::open`]. If it is false,
/// the tokens without a cost are summed from the caches.
fn account<S: LedgerStore>(
    settings: &RunSettings,
    store: S,
    ledger: Ledger,
    is_complete: bool,
    cached_usd: f64,
) -> Result<(Account<S>, InFlight)> {
    let mut minimum_spent = Spent {
        measured_usd: Dollars::at_least(cached_usd),
        ..Spent::default()
    };
    if !is_complete {
        // Older versions recorded measured tokens in the caches only.
        let scores = config::cache_dir(&config::scores_dir(&settings.run_dir));
        for dir in [&settings.cache_dir, &scores] {
            minimum_spent.measured_tokens.add(unpriced(dir)?);
        }
    }
    Account::open(
        store,
        ledger,
        settings.budget_usd,
        &highest_prices(&settings.endpoints),
        &minimum_spent,
    )
}

/// Returns the daily limit of an endpoint, with the requests that earlier runs sent.
pub(crate) fn daily_limit<S: LedgerStore>(
    account: &mut Account<S>,
    upstream: &config::EndpointConfig,
    now: Timestamp,
) -> DailyLimit {
    let slots = account.daily_requests().get(upstream.teacher.label());
    let slots: Vec<_> = slots
        .into_iter()
        .flatten()
        .map(|&(time, count)| ((now - time).get_seconds(), count))
        .collect();
    DailyLimit::new(
        upstream.limits.own().requests_per_day,
        &slots,
        Instant::now(),
    )
}

/// Budget account of a run folder into which records are merged. None if the folder has no complete account yet: the
/// next run counts the merged records when it opens the account.
pub(crate) struct MergeAccount(Option<Account<LedgerFiles>>);

impl MergeAccount {
    /// Opens the account, before anything is merged.
    ///
    /// # Errors
    /// If another process has the account open, or its files are damaged or cannot be written.
    pub(crate) fn open(run_dir: &Path, price: &Price) -> Result<MergeAccount> {
        if !ledger::ledger_path(run_dir).exists() {
            return Ok(MergeAccount(None));
        }
        let (files, ledger, is_complete) = LedgerFiles::open(run_dir)?;
        if !is_complete {
            return Ok(MergeAccount(None));
        }
        let (account, left_in_flight) =
            Account::open(files, ledger, None, price, &Spent::default())?;
        left_in_flight.warn();
        Ok(MergeAccount(Some(account)))
    }

    /// Adds the cost of the merged records to the amount spent. Returns false if the run folder has no complete
    /// account; then the next harvest computes the amount from the cache.
    ///
    /// # Errors
    /// If the account cannot be written.
    pub(crate) fn add(self, cost_usd: f64, unpriced: Usage) -> Result<bool> {
        let Some(mut account) = self.0 else {
            return Ok(false);
        };
        account.add_spent(&Spent {
            measured_usd: Dollars::at_least(cost_usd),
            measured_tokens: unpriced.into(),
            ..Spent::default()
        })?;
        account.close(0)?;
        Ok(true)
    }
}

/// Sums the tokens of cached records without a cost.
fn unpriced(dir: &Path) -> Result<UnpricedTokens> {
    let mut tokens = UnpricedTokens::default();
    if !cache::exists(dir) {
        return Ok(tokens);
    }
    for record in crate::cache::reader::read(dir)? {
        let record = record?;
        if record.cost_usd.is_none()
            && let Some(usage) = record.usage
        {
            tokens.add(usage.into());
        }
    }
    Ok(tokens)
}

/// Returns the highest price of each kind over all teachers.
pub(crate) fn highest_prices(endpoints: &[EndpointConfig]) -> Price {
    let mut highest = Price::default();
    let higher = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    };
    for upstream in endpoints {
        highest.input = higher(highest.input, upstream.price.input);
        highest.cached_input = higher(highest.cached_input, upstream.price.cached_input);
        highest.output = higher(highest.output, upstream.price.output);
    }
    highest
}
