//! What is allowed: the gauges of a script, and the verdict on a request. Pure: the time is an
//! argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::mock::quota::{Quota, QuotaStatus};
use crate::mock::script::limits::{LimitChange, LimitScript, TokenCounting};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenCost {
    pub prompt_tokens: u64,
    /// The longest answers that it allows.
    pub output_tokens: u64,
}

/// Which limit a request ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LimitKind {
    Requests,
    Tokens,
    OutputTokens,
    Day,
    Concurrency,
}

impl LimitKind {
    /// As messages have it.
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

/// A request that was let in. It is given back with [`MockLimiter::release`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdmissionTicket {
    at: Instant,
    cost: TokenCost,
}

/// A request that was not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LimitRefusal {
    pub limit: LimitKind,
    /// Until the same request would be let in, were it alone. None: it never would, or nobody knows.
    pub wait: Option<Duration>,
    /// Whether it asks for more than there ever is.
    pub too_large: bool,
}

/// Every limit as headers tell of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct LimitStatus {
    pub requests: Option<QuotaStatus>,
    pub tokens: Option<QuotaStatus>,
    pub output_tokens: Option<QuotaStatus>,
    pub day: Option<QuotaStatus>,
}

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
    /// Those to come, the next one last.
    changes: Vec<(Instant, f64)>,
}

impl MockLimiter {
    pub(crate) fn new(limits: &LimitScript, now: Instant) -> MockLimiter {
        let quota = |limit: Option<u64>| {
            limit.map(|limit| Quota::per_minute(limit, limits.window, limits.burst_s, now))
        };
        let due = |change: &LimitChange| {
            let after = Duration::try_from_secs_f64(change.at_s).unwrap_or_default();
            (now + after, change.factor)
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
            changes: limits.changes.iter().rev().map(due).collect(),
        }
    }

    /// Requests that were let in and have not left.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Lets a request in, or says why not.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        cost: TokenCost,
    ) -> Result<AdmissionTicket, LimitRefusal> {
        self.apply_changes(now);
        let verdict = self.check(now, cost);
        match verdict {
            Ok(()) => {
                self.in_flight += 1;
                for (_, quota, amount) in self.charges(cost) {
                    quota.charge(now, amount);
                }
                Ok(AdmissionTicket { at: now, cost })
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

    /// The limit that makes a request wait longest.
    fn check(&mut self, now: Instant, cost: TokenCost) -> Result<(), LimitRefusal> {
        if self.concurrency.is_some_and(|most| self.in_flight >= most) {
            return Err(LimitRefusal {
                limit: LimitKind::Concurrency,
                wait: None,
                too_large: false,
            });
        }
        let mut longest: Option<(LimitKind, Duration)> = None;
        for (limit, quota, amount) in self.charges(cost) {
            match quota.time_until(now, amount) {
                None => {
                    return Err(LimitRefusal {
                        limit,
                        wait: None,
                        too_large: true,
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
                too_large: false,
            }),
        }
    }

    /// Every gauge, with what a request costs there.
    fn charges(&mut self, cost: TokenCost) -> impl Iterator<Item = (LimitKind, &mut Quota, f64)> {
        let tokens = match self.output_tokens {
            Some(_) => cost.prompt_tokens,
            None => cost.prompt_tokens + cost.output_tokens,
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

    /// A request has ended, and used so many tokens if it was answered.
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
        let paid: Vec<f64> = self.charges(ticket.cost).map(|charge| charge.2).collect();
        for ((_, quota, amount), paid) in self.charges(used).zip(paid) {
            quota.refund(now, ticket.at, paid - amount);
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

    /// Makes the changes that are due.
    fn apply_changes(&mut self, now: Instant) {
        while let Some(&(at, factor)) = self.changes.last()
            && at <= now
        {
            self.changes.pop();
            let quotas = [
                &mut self.requests,
                &mut self.tokens,
                &mut self.output_tokens,
                &mut self.day,
            ];
            for quota in quotas.into_iter().flatten() {
                quota.set_factor(at, factor);
            }
        }
    }
}
