//! [`Pacer`]: all rate limits of one endpoint behind one call. These are the user's limits, the daily limit, the
//! server's limits, and a gate that is closed after refusals.

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

/// Decides when the requests of one endpoint may be sent.
pub(crate) struct Pacer {
    /// The user's limits that this process counts by itself.
    user_limits: UserLimits,
    /// The user's limits that Redis counts for several processes.
    shared: Option<SharedLimits>,
    server_limits: ServerLimits,
    pub daily_limit: DailyLimit,
    /// No request is sent before this instant.
    closed_until: Option<Instant>,
    /// True from the closing of the gate until a request that was sent after the gate opened again is answered.
    /// Meanwhile, requests are sent one at a time.
    is_half_open: bool,
    /// Instant until which the daily limit or the shared limits refused the last request; None if they did not.
    limited_until: Option<Instant>,
    limits: LimitsConfig,
}

impl Pacer {
    /// Creates a pacer. `largest` is the cost of the largest request; `shared` contains the limits that are shared with
    /// other processes.
    ///
    /// # Errors
    /// If the largest request can never be sent.
    pub(crate) fn new(
        limits: &LimitsConfig,
        largest: RequestCost,
        daily_limit: DailyLimit,
        shared: Option<SharedLimits>,
    ) -> Result<Pacer> {
        let limits = limits.own();
        Ok(Pacer {
            user_limits: UserLimits::new(&limits, largest.tokens())?,
            shared,
            server_limits: ServerLimits::new(Instant::now()),
            daily_limit,
            closed_until: None,
            is_half_open: false,
            limited_until: None,
            limits,
        })
    }

    /// Allows requests of a higher cost than before.
    ///
    /// # Errors
    /// If that request can never be sent.
    pub(crate) fn allow_request_of(&mut self, largest: RequestCost) -> Result<()> {
        self.user_limits.allow_request_of(largest.tokens())?;
        match &mut self.shared {
            Some(shared) => shared.allow_request_of(largest),
            None => Ok(()),
        }
    }

    /// Admits a request. `slots` is the number of requests of this cost that could be sent now without rate limits.
    ///
    /// # Errors
    /// The instant at which to try again.
    pub(crate) fn admit(&mut self, cost: RequestCost, slots: usize) -> Result<SendTicket, Instant> {
        let now = Instant::now();
        if let Some(until) = self.closed_until
            && until > now
        {
            return Err(until);
        }
        self.limited_until = None;
        let mut note_wait = |until| *self.limited_until.insert(until);
        self.daily_limit.check(now).map_err(&mut note_wait)?;
        self.server_limits.check(&cost, now)?;
        // These limits come after the other checks, because what they grant cannot be returned.
        self.user_limits.admit(cost.tokens())?;
        if let Some(shared) = &mut self.shared {
            let taken = shared.take(cost.tokens(), slots, now);
            taken.map_err(note_wait)?;
        }
        self.daily_limit.count_request(now);
        Ok(self.server_limits.charge(cost, now))
    }

    /// Processes the reply of the Redis server, if one has arrived. Returns a change in the availability of the shared
    /// limits, if there is one.
    pub(crate) fn poll_event(&mut self) -> Option<LimiterEvent> {
        self.shared.as_mut().and_then(SharedLimits::poll_event)
    }

    /// Updates the server's limits from the headers of an answer or a refusal. Returns true if the headers report
    /// limits.
    pub(crate) fn update_from_headers(
        &mut self,
        reports: &[LimitReport],
        ticket: &SendTicket,
    ) -> bool {
        if self.limits.follow_headers {
            self.server_limits.sync(reports, ticket, Instant::now());
        }
        !reports.is_empty()
    }

    /// Records an answer: allows several requests at a time again if the request was sent after the gate opened, and
    /// refunds the tokens that the answer did not use.
    pub(crate) fn answered(
        &mut self,
        reports: &[LimitReport],
        ticket: &SendTicket,
        used: Option<RequestCost>,
    ) {
        if self
            .closed_until
            .is_none_or(|until| ticket.sent_at >= until)
        {
            self.is_half_open = false;
        }
        if let Some(used) = used {
            self.server_limits.refund(ticket, &used, reports);
        }
    }

    /// Closes the gate until `until`, unless it is closed for longer. Returns true if the gate was open.
    pub(crate) fn close_until(&mut self, until: Instant) -> bool {
        let was_open = self
            .closed_until
            .is_none_or(|closed_until| closed_until <= Instant::now());
        self.closed_until = self.closed_until.max(Some(until));
        self.is_half_open = true;
        was_open
    }

    /// Returns true if requests may be sent only one at a time, until an answer shows that the server accepts them.
    pub(crate) fn is_half_open(&self) -> bool {
        self.is_half_open
    }

    /// Returns true if no request may be sent: the gate is closed, or the shared limits are unavailable.
    pub(crate) fn is_closed(&self, now: Instant) -> bool {
        self.closed_until.is_some_and(|until| until > now)
            || self
                .shared
                .as_ref()
                .is_some_and(SharedLimits::is_unavailable)
    }

    /// Returns true if the next request waits for the daily limit or the shared limits, and not for the gate.
    pub(crate) fn waits_for_user_limit(&self, now: Instant) -> bool {
        !self.is_closed(now) && self.limited_until.is_some_and(|until| until > now)
    }

    /// Returns a token limit of the server that is smaller than the cost of the request, if there is one.
    pub(crate) fn limit_smaller_than(&self, cost: &RequestCost) -> Option<(Resource, f64)> {
        self.server_limits.limit_smaller_than(cost)
    }

    /// Returns the requests and tokens per minute that the user's and the server's limits allow. Not included are the
    /// user's daily limit, the server's separate limits of input and output tokens, and shared limits, because this
    /// process's share of them is unknown.
    pub(crate) fn per_minute(&self) -> (Option<f64>, Option<f64>) {
        let mut requests = self.limits.requests_per_minute.map(f64::from);
        let mut tokens = self.limits.tokens_per_minute.map(f64::from);
        let lower_to = |limit: &mut Option<f64>, other: f64| {
            *limit = Some(limit.map_or(other, |limit| limit.min(other)));
        };
        for (resource, per_minute) in self.server_limits.per_minute() {
            match resource {
                Resource::Requests => lower_to(&mut requests, per_minute),
                Resource::Tokens => lower_to(&mut tokens, per_minute),
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
    async fn closed_gate_admits_no_request_and_then_one_at_a_time() {
        let mut limiter = Pacer::new(
            &LimitsConfig::default(),
            ONE,
            DailyLimit::new(None, &[], Instant::now()),
            None,
        )
        .unwrap();
        let now = Instant::now();
        let sent_before = limiter.admit(ONE, 1).unwrap();
        assert!(limiter.close_until(now + Duration::from_secs(20)));
        assert!(!limiter.close_until(now + Duration::from_secs(5)));
        assert_eq!(
            limiter.admit(ONE, 1).unwrap_err(),
            now + Duration::from_secs(20)
        );
        tokio::time::advance(Duration::from_secs(20)).await;
        let first = limiter.admit(ONE, 1).unwrap();
        assert!(limiter.is_half_open());
        // The answer to a request sent before the gate closed does not end the half-open state.
        limiter.answered(&[], &sent_before, None);
        assert!(limiter.is_half_open());
        limiter.answered(&[], &first, None);
        assert!(!limiter.is_half_open());
        assert!(limiter.close_until(now + Duration::from_secs(30)));
    }

    #[tokio::test(start_paused = true)]
    async fn stricter_of_user_and_server_limits_applies() {
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
        let ticket = limiter.admit(ONE, 1).unwrap();
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
        assert!(limiter.update_from_headers(&reports, &ticket));
        assert_eq!(limiter.per_minute(), (Some(60.0), Some(9_000.0)));
        let wait = limiter.admit(ONE, 1).unwrap_err() - Instant::now();
        assert!((0.9..1.1).contains(&wait.as_secs_f64()), "{wait:?}");
    }
}
