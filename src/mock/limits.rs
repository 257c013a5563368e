//! [`MockLimiter`]: admits or rejects requests by the limits of a script. Pure: the time is an argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::mock::quota::{Quota, QuotaStatus};
use crate::mock::script::limits::{LimitChange, LimitScript, TokenCounting};

/// The numbers of tokens charged for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenCost {
    pub prompt_tokens: u64,
    /// Maximum number of tokens of all its answers. After the answers were sent, their actual number of tokens.
    pub output_tokens: u64,
}

impl TokenCost {
    /// Returns the number of all tokens. It saturates, because a client may send any `max_tokens`.
    pub(crate) fn total(self) -> u64 {
        self.prompt_tokens.saturating_add(self.output_tokens)
    }
}

/// The limit that a request exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LimitKind {
    Requests,
    Tokens,
    OutputTokens,
    Day,
    Concurrency,
}

impl LimitKind {
    /// Returns the name in error messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            LimitKind::Requests => "requests per min (RPM)",
            LimitKind::Tokens => "tokens per min (TPM)",
            LimitKind::OutputTokens => "output tokens per min (OTPM)",
            LimitKind::Day => "requests per day (RPD)",
            LimitKind::Concurrency => "concurrent requests",
        }
    }
}

/// An admitted request. Pass it to [`MockLimiter::release`] when the request ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdmissionTicket {
    admitted_at: Instant,
    cost: TokenCost,
}

/// The reason why a request is rejected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LimitRefusal {
    pub limit: LimitKind,
    /// Time until the same request would be admitted if no other request arrived. None if that time is unknown, or if
    /// the request is too large.
    pub wait: Option<Duration>,
    /// True if the request exceeds the capacity of the limit, so that no wait helps.
    pub is_too_large: bool,
}

/// The values of all limits for the rate-limit headers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct LimitStatus {
    pub requests: Option<QuotaStatus>,
    pub tokens: Option<QuotaStatus>,
    pub output_tokens: Option<QuotaStatus>,
    pub day: Option<QuotaStatus>,
}

/// The state of all limits.
#[derive(Debug)]
pub(crate) struct MockLimiter {
    requests: Option<Quota>,
    tokens: Option<Quota>,
    output_tokens: Option<Quota>,
    day: Option<Quota>,
    concurrency: Option<u64>,
    in_flight: u64,
    counts: TokenCounting,
    count_refused: bool,
    /// Times and factors of the changes that are not applied yet, the next one last.
    changes: Vec<(Instant, f64)>,
}

impl MockLimiter {
    pub(crate) fn new(limits: &LimitScript, now: Instant) -> MockLimiter {
        let quota = |limit: Option<u64>| {
            limit.map(|limit| Quota::per_minute(limit, limits.window, limits.burst_s, now))
        };
        let with_time = |change: &LimitChange| {
            let delay = Duration::try_from_secs_f64(change.at_s).unwrap_or_default();
            (now + delay, change.factor)
        };
        MockLimiter {
            requests: quota(limits.requests_per_minute),
            tokens: quota(limits.tokens_per_minute),
            output_tokens: quota(limits.output_tokens_per_minute),
            day: limits
                .requests_per_day
                .map(|limit| Quota::per_day(limit, now)),
            concurrency: limits.concurrency,
            in_flight: 0,
            counts: limits.counts,
            count_refused: limits.count_refused,
            changes: limits.changes.iter().rev().map(with_time).collect(),
        }
    }

    /// Returns the number of admitted requests that are not released.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Admits and charges a request, or rejects it.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        cost: TokenCost,
    ) -> Result<AdmissionTicket, LimitRefusal> {
        self.apply_changes(now);
        match self.check(now, cost) {
            Ok(()) => {
                self.in_flight += 1;
                for (_, quota, amount) in self.charges(cost) {
                    quota.charge(now, amount);
                }
                Ok(AdmissionTicket {
                    admitted_at: now,
                    cost,
                })
            }
            Err(refusal) => {
                if self.count_refused {
                    for quota in self.requests.iter_mut().chain(&mut self.day) {
                        quota.charge(now, 1.0);
                    }
                }
                Err(refusal)
            }
        }
    }

    /// Checks a request against all limits. The error names the limit of concurrent requests, else a limit that the
    /// request exceeds by itself, else the limit with the longest wait.
    fn check(&mut self, now: Instant, cost: TokenCost) -> Result<(), LimitRefusal> {
        if self
            .concurrency
            .is_some_and(|limit| self.in_flight >= limit)
        {
            return Err(LimitRefusal {
                limit: LimitKind::Concurrency,
                wait: None,
                is_too_large: false,
            });
        }
        let mut longest: Option<(LimitKind, Duration)> = None;
        for (limit, quota, amount) in self.charges(cost) {
            match quota.time_until(now, amount) {
                None => {
                    return Err(LimitRefusal {
                        limit,
                        wait: None,
                        is_too_large: true,
                    });
                }
                Some(Duration::ZERO) => {}
                Some(wait) if longest.is_some_and(|(_, other)| wait <= other) => {}
                Some(wait) => longest = Some((limit, wait)),
            }
        }
        match longest {
            None => Ok(()),
            Some((limit, wait)) => Err(LimitRefusal {
                limit,
                wait: Some(wait),
                is_too_large: false,
            }),
        }
    }

    /// Returns the quotas of the script, each with the amount charged for a request.
    fn charges(&mut self, cost: TokenCost) -> impl Iterator<Item = (LimitKind, &mut Quota, f64)> {
        let tokens = match self.output_tokens {
            Some(_) => cost.prompt_tokens,
            None => cost.total(),
        };
        [
            (LimitKind::Requests, &mut self.requests, 1),
            (LimitKind::Tokens, &mut self.tokens, tokens),
            (
                LimitKind::OutputTokens,
                &mut self.output_tokens,
                cost.output_tokens,
            ),
            (LimitKind::Day, &mut self.day, 1),
        ]
        .into_iter()
        .filter_map(|(limit, quota, amount)| Some((limit, quota.as_mut()?, amount as f64)))
    }

    /// Releases a request that has ended. `used` are the tokens of its answer, if it has one.
    pub(crate) fn release(
        &mut self,
        now: Instant,
        ticket: AdmissionTicket,
        used: Option<TokenCost>,
    ) {
        self.apply_changes(now);
        self.in_flight -= 1;
        let (TokenCounting::Actual, Some(used)) = (self.counts, used) else {
            return;
        };
        let charged: Vec<f64> = self.charges(ticket.cost).map(|charge| charge.2).collect();
        for ((_, quota, amount), charged) in self.charges(used).zip(charged) {
            quota.refund(now, ticket.admitted_at, charged - amount);
        }
    }

    pub(crate) fn status(&mut self, now: Instant) -> LimitStatus {
        self.apply_changes(now);
        let read = |quota: &mut Option<Quota>| quota.as_mut().map(|quota| quota.status(now));
        LimitStatus {
            requests: read(&mut self.requests),
            tokens: read(&mut self.tokens),
            output_tokens: read(&mut self.output_tokens),
            day: read(&mut self.day),
        }
    }

    /// Applies the changes that are due.
    fn apply_changes(&mut self, now: Instant) {
        while let Some(&(change_at, factor)) = self.changes.last()
            && change_at <= now
        {
            self.changes.pop();
            let quotas = [
                &mut self.requests,
                &mut self.tokens,
                &mut self.output_tokens,
                &mut self.day,
            ];
            for quota in quotas.into_iter().flatten() {
                quota.set_factor(change_at, factor);
            }
        }
    }
}
