//! When a request may leave: the user's ceilings, the server's own limits as its headers tell them,
//! the day's allowance, and one gate for everybody.
//!
//! | file | holds |
//! |---|---|
//! | `ceiling` | the user's requests and tokens a minute, by governor |
//! | `day` | the user's requests a day, across restarts |
//! | `headers` | what a server says about its limits, in any dialect |
//! | `mirror` | the server's buckets as we believe them to stand |
//! | `concurrency` | how many requests may be in flight |
//! | `shared` | the user's ceilings, kept in Redis for several processes (feature `redis`) |

use anyhow::Result;
use tokio::time::Instant;

use crate::config::LimitsConfig;
pub(crate) use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::headers::{LimitReport, Resource};
pub(crate) use crate::rate_limit::redis::{LimiterEvent, SharedLimits};
pub(crate) use crate::rate_limit::send_ticket::SendTicket;
use crate::rate_limit::server_limits::ServerLimits;
use crate::rate_limit::user_limits::UserLimits;

pub(crate) struct Pacer {
    /// Those that are not shared.
    ceilings: UserLimits,
    shared: Option<SharedLimits>,
    mirror: ServerLimits,
    pub day: DailyLimit,
    /// Nothing leaves before.
    closed_until: Option<Instant>,
    /// The gate has just been closed by a refusal: one request goes first, to see.
    is_half_open: bool,
    limits: LimitsConfig,
}

impl Pacer {
    /// `largest` is the most that a request to come will use; `shared` keeps what other processes
    /// share.
    ///
    /// # Errors
    /// Where a request could never leave.
    pub(crate) fn new(
        limits: &LimitsConfig,
        largest: RequestCost,
        day: DailyLimit,
        shared: Option<SharedLimits>,
    ) -> Result<Pacer> {
        let limits = limits.own();
        Ok(Pacer {
            ceilings: UserLimits::new(&limits, largest.tokens())?,
            shared,
            mirror: ServerLimits::new(Instant::now()),
            day,
            closed_until: None,
            is_half_open: false,
            limits,
        })
    }

    /// Makes room for a request that is larger than was known when it was made.
    ///
    /// # Errors
    /// Where it could never leave.
    pub(crate) fn allow_request_of(&mut self, largest: RequestCost) -> Result<()> {
        self.ceilings.allow_request_of(largest.tokens())
    }

    /// Lets a request out, or says when to ask again. There is room for `room` such requests.
    pub(crate) fn admit(&mut self, cost: RequestCost, room: usize) -> Result<SendTicket, Instant> {
        let now = Instant::now();
        if let Some(until) = self.closed_until
            && until > now
        {
            return Err(until);
        }
        self.day.check(now)?;
        self.mirror.check(&cost, now)?;
        // Last, since what it grants cannot be given back.
        self.ceilings.admit(cost.tokens())?;
        if let Some(shared) = &mut self.shared {
            shared.take(cost.tokens(), room, now)?;
        }
        self.day.count(now);
        Ok(self.mirror.charge(cost, now))
    }

    /// What is new about the limits that are shared.
    pub(crate) fn poll_event(&mut self) -> Option<LimiterEvent> {
        self.shared.as_mut().and_then(SharedLimits::poll_event)
    }

    /// Learns from the headers of a reply, be it an answer or a refusal. True if there were any.
    pub(crate) fn update_from_headers(
        &mut self,
        reports: &[LimitReport],
        departure: &SendTicket,
    ) -> bool {
        if self.limits.follow_headers {
            self.mirror.sync(reports, departure, Instant::now());
        }
        !reports.is_empty()
    }

    /// An answer came: the gate is open, and tokens that it did not use are given back.
    pub(crate) fn answered(
        &mut self,
        reports: &[LimitReport],
        departure: &SendTicket,
        used: Option<RequestCost>,
    ) {
        if self.closed_until.is_none_or(|until| departure.at >= until) {
            self.is_half_open = false;
        }
        if let Some(used) = used {
            self.mirror.refund(departure, &used, reports);
        }
    }

    /// Closes the gate until then, or leaves it closed for longer. True if it was open.
    pub(crate) fn close_until(&mut self, until: Instant) -> bool {
        let was_open = self
            .closed_until
            .is_none_or(|until| until <= Instant::now());
        self.closed_until = self.closed_until.max(Some(until));
        self.is_half_open = true;
        was_open
    }

    /// After the gate was closed one request goes first, and the others when it is answered.
    pub(crate) fn is_half_open(&self) -> bool {
        self.is_half_open
    }

    /// Nothing leaves for now: the gate is closed, or a limit that is shared cannot be asked for.
    pub(crate) fn is_closed(&self, now: Instant) -> bool {
        self.closed_until.is_some_and(|until| until > now)
            || self.shared.as_ref().is_some_and(SharedLimits::is_silent)
    }

    /// The server's limit that is too small for a request of this cost, however long it waits.
    pub(crate) fn too_small(&self, cost: &RequestCost) -> Option<(Resource, f64)> {
        self.mirror.too_small(cost)
    }

    /// What all the limits together grant in a minute: requests, tokens. Of a limit that is shared
    /// nobody knows this process's part.
    pub(crate) fn per_minute(&self) -> (Option<f64>, Option<f64>) {
        let mut requests = self.limits.requests_per_minute.map(f64::from);
        let mut tokens = self.limits.tokens_per_minute.map(f64::from);
        let at_most = |limit: &mut Option<f64>, other: f64| {
            *limit = Some(limit.map_or(other, |limit| limit.min(other)));
        };
        for (resource, per_minute) in self.mirror.per_minute() {
            match resource {
                Resource::Requests => at_most(&mut requests, per_minute),
                Resource::Tokens => at_most(&mut tokens, per_minute),
                Resource::InputTokens | Resource::OutputTokens => {}
            }
        }
        (requests, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const ONE: RequestCost = RequestCost {
        input_tokens: 1,
        output_tokens: 1,
    };

    #[tokio::test(start_paused = true)]
    async fn nothing_leaves_while_the_gate_is_closed_and_then_one_goes_first() {
        let mut limiter = Pacer::new(
            &LimitsConfig::default(),
            ONE,
            DailyLimit::new(None, &[], Instant::now()),
            None,
        )
        .unwrap();
        let now = Instant::now();
        let early = limiter.admit(ONE, 1).unwrap();
        assert!(limiter.close_until(now + Duration::from_secs(20)));
        assert!(!limiter.close_until(now + Duration::from_secs(5)));
        assert_eq!(
            limiter.admit(ONE, 1).unwrap_err(),
            now + Duration::from_secs(20)
        );
        tokio::time::advance(Duration::from_secs(20)).await;
        let first = limiter.admit(ONE, 1).unwrap();
        assert!(limiter.is_half_open());
        // What left before the gate closed shows nothing.
        limiter.answered(&[], &early, None);
        assert!(limiter.is_half_open());
        limiter.answered(&[], &first, None);
        assert!(!limiter.is_half_open());
        assert!(limiter.close_until(now + Duration::from_secs(30)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_smaller_of_the_users_and_the_servers_limits_counts() {
        let limits = LimitsConfig {
            requests_per_minute: Some(600),
            ..LimitsConfig::default()
        };
        let mut limiter = Pacer::new(
            &limits,
            ONE,
            DailyLimit::new(None, &[], Instant::now()),
            None,
        )
        .unwrap();
        let departure = limiter.admit(ONE, 1).unwrap();
        let headers = [
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-limit-tokens", "9000"),
        ];
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        let reports =
            crate::rate_limit::headers::parse(&headers, std::time::SystemTime::UNIX_EPOCH);
        assert!(limiter.update_from_headers(&reports, &departure));
        assert_eq!(limiter.per_minute(), (Some(60.0), Some(9_000.0)));
        let wait = limiter.admit(ONE, 1).unwrap_err() - Instant::now();
        assert!((0.9..1.1).contains(&wait.as_secs_f64()), "{wait:?}");
    }
}
