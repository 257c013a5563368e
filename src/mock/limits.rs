//! What is allowed: the gauges of a script, and the verdict on a request. Pure: the time is an
//! argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::mock::quota::{Gauge, Reading};
use crate::mock::script::limits::{Change, Counts, Limits};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    pub prompt_tokens: u64,
    /// The longest answers that it allows.
    pub output_tokens: u64,
}

/// Which limit a request ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    Requests,
    Tokens,
    OutputTokens,
    Day,
    Concurrency,
}

impl Limit {
    /// As messages have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Limit::Requests => "requests per min (RPM)",
            Limit::Tokens => "tokens per min (TPM)",
            Limit::OutputTokens => "output tokens per min (OTPM)",
            Limit::Day => "requests per day (RPD)",
            Limit::Concurrency => "concurrent requests",
        }
    }
}

/// A request that was let in. It is given back with [`Limiter::leave`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    at: Instant,
    cost: Cost,
}

/// A request that was not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Refusal {
    pub limit: Limit,
    /// Until the same request would be let in, were it alone. None: it never would, or nobody knows.
    pub wait: Option<Duration>,
    /// Whether it asks for more than there ever is.
    pub too_large: bool,
}

/// Every limit as headers tell of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Readings {
    pub requests: Option<Reading>,
    pub tokens: Option<Reading>,
    pub output_tokens: Option<Reading>,
    pub day: Option<Reading>,
}

#[derive(Debug)]
pub(crate) struct Limiter {
    requests: Option<Gauge>,
    tokens: Option<Gauge>,
    output_tokens: Option<Gauge>,
    day: Option<Gauge>,
    concurrency: Option<u64>,
    in_flight: u64,
    counts: Counts,
    count_refused: bool,
    /// Those to come, the next one last.
    changes: Vec<(Instant, f64)>,
}

impl Limiter {
    pub(crate) fn new(limits: &Limits, now: Instant) -> Limiter {
        let gauge = |limit: Option<u64>| {
            limit.map(|limit| Gauge::per_minute(limit, limits.window, limits.burst_s, now))
        };
        let due = |change: &Change| {
            let after = Duration::try_from_secs_f64(change.at_s).unwrap_or_default();
            (now + after, change.factor)
        };
        Limiter {
            requests: gauge(limits.requests_per_minute),
            tokens: gauge(limits.tokens_per_minute),
            output_tokens: gauge(limits.output_tokens_per_minute),
            day: limits
                .requests_per_day
                .map(|limit| Gauge::per_day(limit, now)),
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
    pub(crate) fn admit(&mut self, now: Instant, cost: Cost) -> Result<Ticket, Refusal> {
        self.change(now);
        let verdict = self.check(now, cost);
        match verdict {
            Ok(()) => {
                self.in_flight += 1;
                for (_, gauge, amount) in self.charges(cost) {
                    gauge.take(now, amount);
                }
                Ok(Ticket { at: now, cost })
            }
            Err(refusal) => {
                if self.count_refused {
                    for gauge in self.requests.iter_mut().chain(&mut self.day) {
                        gauge.take(now, 1.0);
                    }
                }
                Err(refusal)
            }
        }
    }

    /// The limit that makes a request wait longest.
    fn check(&mut self, now: Instant, cost: Cost) -> Result<(), Refusal> {
        if self.concurrency.is_some_and(|most| self.in_flight >= most) {
            return Err(Refusal {
                limit: Limit::Concurrency,
                wait: None,
                too_large: false,
            });
        }
        let mut longest: Option<(Limit, Duration)> = None;
        for (limit, gauge, amount) in self.charges(cost) {
            match gauge.wait(now, amount) {
                None => {
                    return Err(Refusal {
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
            Some((limit, wait)) => Err(Refusal {
                limit,
                wait: Some(wait),
                too_large: false,
            }),
        }
    }

    /// Every gauge, with what a request costs there.
    fn charges(&mut self, cost: Cost) -> impl Iterator<Item = (Limit, &mut Gauge, f64)> {
        let tokens = match self.output_tokens {
            Some(_) => cost.prompt_tokens,
            None => cost.prompt_tokens + cost.output_tokens,
        };
        [
            (Limit::Requests, &mut self.requests, 1),
            (Limit::Tokens, &mut self.tokens, tokens),
            (
                Limit::OutputTokens,
                &mut self.output_tokens,
                cost.output_tokens,
            ),
            (Limit::Day, &mut self.day, 1),
        ]
        .into_iter()
        .filter_map(|(limit, gauge, amount)| Some((limit, gauge.as_mut()?, amount as f64)))
    }

    /// A request has ended, and used so many tokens if it was answered.
    pub(crate) fn leave(&mut self, now: Instant, ticket: Ticket, used: Option<Cost>) {
        self.change(now);
        self.in_flight -= 1;
        let (Counts::Actual, Some(used)) = (self.counts, used) else {
            return;
        };
        let paid: Vec<f64> = self.charges(ticket.cost).map(|charge| charge.2).collect();
        for ((_, gauge, amount), paid) in self.charges(used).zip(paid) {
            gauge.give_back(now, ticket.at, paid - amount);
        }
    }

    pub(crate) fn read(&mut self, now: Instant) -> Readings {
        self.change(now);
        let read = |gauge: &mut Option<Gauge>| gauge.as_mut().map(|gauge| gauge.read(now));
        Readings {
            requests: read(&mut self.requests),
            tokens: read(&mut self.tokens),
            output_tokens: read(&mut self.output_tokens),
            day: read(&mut self.day),
        }
    }

    /// Makes the changes that are due.
    fn change(&mut self, now: Instant) {
        while let Some(&(at, factor)) = self.changes.last()
            && at <= now
        {
            self.changes.pop();
            let gauges = [
                &mut self.requests,
                &mut self.tokens,
                &mut self.output_tokens,
                &mut self.day,
            ];
            for gauge in gauges.into_iter().flatten() {
                gauge.scale(at, factor);
            }
        }
    }
}
