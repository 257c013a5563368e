//! The user's limits, counted in Redis for all processes that use the same model at the same endpoint.
//!
//! | file | content |
//! |---|---|
//! | `admit.lua` | script that the Redis server runs atomically: admits and charges requests |
//! | `rules` | arguments and reply of the script, and the names of its keys |
//! | `connection` | the connection to the server (feature `redis`; `no_connection` without it) |
//! | `local_permits` | permits that were granted and not used yet |
//!
//! # The arithmetic
//!
//! Each limit per minute is the Generic Cell Rate Algorithm in its form as a continuous-state leaky
//! bucket (ITU-T I.371, annex A; ATM Forum TM 4.0, section 4.4.2). A bucket has a level X, which was last written at
//! the time LCT (last conformance time), an increment I, which is the time that one unit takes at the limit, and a
//! tolerance L. At the time t it has drained to X' = max(0, X - (t - LCT)). If X' > L the request waits for X' - L;
//! otherwise X becomes X' + n I for a request of n units, and LCT becomes t. The amount admitted in a time w is then at
//! most (w + L) / I plus the last request. With L = (burst - largest) I, where `largest` is the largest request of any
//! process, that is limit + burst in a minute. As for one process alone, the burst is
//! [`crate::rate_limit::user_limits::burst`] or the largest request, whichever is more.
//! The condition does not depend on n, so a process with small requests cannot starve another one with large
//! requests.
//!
//! One reply may grant several requests. If the process still has unused permits (see [`local_permits`]), the script
//! subtracts them from the amounts that it charges.
//!
//! A day is counted in slots of five minutes. A slot counts until 24 hours after its end.
//!
//! # Guarantees
//!
//! The script reads all times from the server's clock. A permit is used within
//! [`crate::rate_limit::redis::local_permits::MAX_PERMIT_AGE`] of the reply that grants it, or dropped. Unless replies
//! are delayed, at most the limit, one burst, and the amount that drains in `MAX_PERMIT_AGE` are sent in any minute. If
//! no request is larger than the usual burst, this is the limit plus one second of it. While the server is unavailable,
//! no request is sent. If the server has lost its data (by a restart without persistence, or an eviction), one more
//! burst is admitted, and the count of the day starts at 0.

#[cfg(feature = "redis")]
pub(crate) mod connection;
#[cfg(not(feature = "redis"))]
#[path = "no_connection.rs"]
pub(crate) mod connection;
pub(crate) mod local_permits;
pub(crate) mod rules;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Notify;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::Instant;

use crate::config;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::redis::connection::Connection;
use crate::rate_limit::redis::local_permits::LocalPermits;
use crate::rate_limit::redis::rules::{Arguments, SharedCharge, SharedRules};
use crate::rate_limit::user_limits;

/// Maximum wait for the limits until the script runs again. A longer wait could be wrong, because meanwhile the server
/// may lose its data, or its clock may be set.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Maximum time until the dispatcher checks for a reply. Usually the reply wakes it earlier.
const REPLY_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Pause before the second attempt to reach an unavailable server. It doubles after each attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Maximum pause between attempts to reach an unavailable server.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Shared limits of one endpoint. At most one call of the script is in progress.
pub(crate) struct SharedLimits {
    limits: config::LimitsConfig,
    /// Tokens of the largest request.
    largest: u64,
    rules: SharedRules,
    calls: Sender<Arguments>,
    replies: Receiver<ScriptReply>,
    is_call_pending: bool,
    permits: LocalPermits,
    /// Earliest instant of the next call, if the limits are used up or the server is unavailable.
    not_before: Option<Instant>,
    outage: Option<RedisOutage>,
    /// Length of an outage after which the run ends.
    max_outage: Duration,
}

/// Time of a reply, with the amounts charged or a description of the error.
type ScriptReply = (Instant, Result<SharedCharge, String>);

/// Outage of the server.
struct RedisOutage {
    start: Instant,
    /// Pause before the next attempt.
    pause: Duration,
}

/// Change in the availability of the server, for a message to the user.
pub(crate) enum LimiterEvent {
    /// The server has become unavailable, so no request is sent. Contains the error.
    Unavailable(String),
    /// The server is available again. Contains the length of the outage.
    Recovered(Duration),
    /// The outage has reached its maximum length. Contains its length and the error.
    OutageTooLong(Duration, String),
}

impl SharedLimits {
    /// Connects to the server if the limits of `endpoint` are shared. `largest` is the cost of the largest request;
    /// `wake` is notified of each reply.
    ///
    /// # Errors
    /// If the largest request can never be sent, or the connection cannot be opened.
    pub(crate) async fn connect(
        endpoint: &config::EndpointConfig,
        largest: RequestCost,
        max_outage: Duration,
        wake: &Arc<Notify>,
    ) -> Result<Option<SharedLimits>> {
        let Some(url) = &endpoint.limits.shared else {
            return Ok(None);
        };
        user_limits::check_largest(&endpoint.limits, largest.tokens())?;
        let connection = Connection::open(url, rules::keys(&endpoint.teacher)).await?;
        let (calls, pending_calls) = mpsc::channel(1);
        let (reply_sender, replies) = mpsc::channel(1);
        let wake = Arc::clone(wake);
        tokio::spawn(run_calls(connection, pending_calls, reply_sender, wake));
        let limits = endpoint.limits.clone();
        Ok(Some(SharedLimits::new(
            limits,
            largest.tokens(),
            calls,
            replies,
            max_outage,
        )))
    }

    /// Creates the limits. `calls` and `replies` are the channels of [`run_calls`].
    fn new(
        limits: config::LimitsConfig,
        largest: u64,
        calls: Sender<Arguments>,
        replies: Receiver<ScriptReply>,
        max_outage: Duration,
    ) -> SharedLimits {
        SharedLimits {
            rules: SharedRules::new(&limits, largest),
            limits,
            largest,
            calls,
            replies,
            is_call_pending: false,
            permits: LocalPermits::default(),
            not_before: None,
            outage: None,
            max_outage,
        }
    }

    /// Allows requests of a higher cost than before. The rules change, because the script subtracts the largest request
    /// from the burst.
    ///
    /// # Errors
    /// If that request can never be sent.
    pub(crate) fn allow_request_of(&mut self, largest: RequestCost) -> Result<()> {
        let largest = largest.tokens();
        if largest > self.largest {
            user_limits::check_largest(&self.limits, largest)?;
            self.rules = SharedRules::new(&self.limits, largest);
            self.largest = largest;
        }
        Ok(())
    }

    /// Takes a local permit for a request of `tokens` tokens. If the local permits do not cover it, calls the script
    /// for more. `slots` is the number of requests of this size that could be sent now without rate limits.
    ///
    /// # Errors
    /// The instant at which to try again, unless a reply arrives earlier.
    pub(crate) fn take(&mut self, tokens: u64, slots: usize, now: Instant) -> Result<(), Instant> {
        if self.permits.take(tokens, now) {
            return Ok(());
        }
        if let Some(until) = self.not_before.filter(|until| *until > now) {
            return Err(until);
        }
        if !self.is_call_pending {
            let count = self.permits.next_batch(slots, now);
            let arguments = self.rules.arguments(count, tokens, self.permits.unused());
            // If the channel is closed, `poll_event` reports it.
            self.is_call_pending = self.calls.try_send(arguments).is_ok();
        }
        Err(now + REPLY_CHECK_INTERVAL)
    }

    /// Processes the reply of the server, if one has arrived. Returns a change in the server's availability.
    pub(crate) fn poll_event(&mut self) -> Option<LimiterEvent> {
        let (replied_at, reply) = match self.replies.try_recv() {
            Ok(reply) => reply,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                (Instant::now(), Err("the connection has failed".into()))
            }
        };
        self.is_call_pending = false;
        match reply {
            Ok(charged) => {
                self.not_before = (charged.requests + charged.tokens == 0)
                    .then(|| replied_at + charged.wait.min(MAX_WAIT));
                self.permits
                    .add(charged.requests, charged.tokens, replied_at);
                let outage = self.outage.take()?;
                Some(LimiterEvent::Recovered(replied_at - outage.start))
            }
            Err(reason) => self.fail(replied_at, reason),
        }
    }

    /// Records a failed call, and schedules the next attempt.
    fn fail(&mut self, now: Instant, reason: String) -> Option<LimiterEvent> {
        let is_new = self.outage.is_none();
        let outage = self.outage.get_or_insert(RedisOutage {
            start: now,
            pause: FIRST_PAUSE,
        });
        let length = now - outage.start;
        if length >= self.max_outage {
            return Some(LimiterEvent::OutageTooLong(length, reason));
        }
        // The last attempt is made when the outage reaches its maximum length.
        self.not_before = Some(now + outage.pause.min(self.max_outage - length));
        outage.pause = (outage.pause * 2).min(MAX_PAUSE);
        is_new.then_some(LimiterEvent::Unavailable(reason))
    }

    /// Returns true during an outage of the server.
    pub(crate) fn is_unavailable(&self) -> bool {
        self.outage.is_some()
    }
}

/// Runs the calls of the script one after the other, until the other end of `calls` or `replies` is dropped.
async fn run_calls(
    mut connection: Connection,
    mut calls: Receiver<Arguments>,
    replies: Sender<ScriptReply>,
    wake: Arc<Notify>,
) {
    while let Some(arguments) = calls.recv().await {
        let charged = connection.admit(&arguments).await;
        let charged = charged.map(SharedCharge::new);
        if replies.send((Instant::now(), charged)).await.is_err() {
            return;
        }
        wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(tokens: u64) -> RequestCost {
        RequestCost {
            input_tokens: tokens,
            output_tokens: 0,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn larger_request_is_reported_to_the_script() {
        let limits = config::LimitsConfig {
            tokens_per_minute: Some(6_000),
            ..config::LimitsConfig::default()
        };
        let (calls, mut pending_calls) = mpsc::channel(1);
        let (_reply_sender, replies) = mpsc::channel(1);
        let max_outage = Duration::from_secs(60);
        let mut shared = SharedLimits::new(limits.clone(), 100, calls, replies, max_outage);
        for smaller_or_equal in [50, 100] {
            shared.allow_request_of(cost(smaller_or_equal)).unwrap();
        }
        shared.allow_request_of(cost(1_000)).unwrap();
        assert!(shared.take(1_000, 1, Instant::now()).is_err());
        let expected = SharedRules::new(&limits, 1_000).arguments(1, 1_000, (0, 0));
        assert_eq!(pending_calls.try_recv().unwrap(), expected);
        assert!(shared.allow_request_of(cost(6_001)).is_err());
    }
}
