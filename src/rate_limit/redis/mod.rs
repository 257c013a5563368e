//! The user's ceilings, kept in Redis for every process that asks the same model of the same endpoint.
//!
//! | file | holds |
//! |---|---|
//! | `rules` | the ceilings in the numbers of the script; the names of its keys |
//! | `admit.lua` | the decision, one step of the server |
//! | `connection` | the way to the server (feature `redis`; `no_connection` without it) |
//! | `hand` | permits that have been granted and not used yet |
//!
//! # The arithmetic
//!
//! Each ceiling of a minute is the Generic Cell Rate Algorithm in its form as a continuous-state leaky
//! bucket (ITU-T I.371, annex A; ATM Forum TM 4.0, section 4.4.2). A bucket has a level X, last written
//! at LCT, and an increment I, the time that one unit takes at the limit. At the time t it has drained
//! to X' = max(0, X - (t - LCT)). If X' > L the request waits for X' - L; else X becomes X' + n I for a
//! request of n units, and LCT becomes t. What is admitted in a time w is then at most
//! (w + L) / I plus the last request. With L = burst - largest, where `largest` is the largest request
//! that any of the processes may send, that is limit + burst in a minute, with the burst of
//! [`crate::rate_limit::user_limits::burst`] or the largest request, whichever is more: as for one process alone.
//! The condition does not depend on n, so that no process with small requests keeps out another one
//! with large ones.
//!
//! Several requests may be granted in one answer, and one bucket may have been paid for before the
//! other (see [`hand`]): what is in hand counts as not yet in the bucket.
//!
//! A day is counted by slots of five minutes, each of which counts until its end is a day ago.
//!
//! # What is promised
//!
//! All times are those of the server's clock, which is asked within the script. A permit leaves within
//! [`crate::rate_limit::redis::local_permits::HELD`] or not at all, so that in any minute limit + burst + `HELD`'s worth may leave:
//! the limit and one second's worth. A permit that is not used is lost. While the server cannot be
//! asked nothing leaves. A server that forgets (a restart without persistence, an eviction) lets out one
//! burst more, and begins the day anew.

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

/// The longest time until the server is asked again: it may have forgotten, or its clock may have been
/// set.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// When to look for an answer that should have come: it wakes the dispatcher by itself.
const OVERDUE: Duration = Duration::from_secs(1);

/// Pauses between attempts to reach the server.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The ceilings as one endpoint sees them. One question at a time is on its way.
pub(crate) struct SharedLimits {
    rules: SharedRules,
    questions: Sender<Arguments>,
    answers: Receiver<Answer>,
    is_asking: bool,
    hand: LocalPermits,
    /// There is no room before, or the server is not asked before.
    not_before: Option<Instant>,
    silence: Option<RedisOutage>,
    /// For so long a silence is borne.
    patience: Duration,
}

/// When it came, and what was charged, or why nobody knows.
type Answer = (Instant, Result<SharedCharge, String>);

/// The server cannot be asked.
struct RedisOutage {
    since: Instant,
    pause: Duration,
}

/// What the user is to know.
pub(crate) enum LimiterEvent {
    /// The server cannot be asked, for this reason: nothing leaves.
    Silent(String),
    /// It can again, after so long.
    Back(Duration),
    /// It could not be asked for longer than is borne.
    Over(Duration, String),
}

impl SharedLimits {
    /// Connects to the server that keeps the ceilings of `endpoint`, if they are shared. `largest` is the
    /// most that a request to come will use; `wake` is notified when there is something to hear.
    ///
    /// # Errors
    /// Where a request could never leave, or the server cannot be asked.
    pub(crate) async fn connect(
        endpoint: &config::EndpointConfig,
        largest: RequestCost,
        patience: Duration,
        wake: &Arc<Notify>,
    ) -> Result<Option<SharedLimits>> {
        let Some(url) = &endpoint.limits.shared else {
            return Ok(None);
        };
        user_limits::check_largest(&endpoint.limits, largest.tokens())?;
        let connection = Connection::open(url, rules::keys(&endpoint.teacher)).await?;
        let (questions, asked) = mpsc::channel(1);
        let (answer, answers) = mpsc::channel(1);
        tokio::spawn(answer_all(connection, asked, answer, Arc::clone(wake)));
        Ok(Some(SharedLimits {
            rules: SharedRules::new(&endpoint.limits, largest.tokens()),
            questions,
            answers,
            is_asking: false,
            hand: LocalPermits::default(),
            not_before: None,
            silence: None,
            patience,
        }))
    }

    /// Takes a permit for a request of so many tokens from the hand, or sees to it that one comes:
    /// then when to ask again, unless there is something to hear before. There is room for `room`
    /// such requests.
    pub(crate) fn take(&mut self, tokens: u64, room: usize, now: Instant) -> Result<(), Instant> {
        if self.hand.take(tokens, now) {
            return Ok(());
        }
        if let Some(until) = self.not_before.filter(|until| *until > now) {
            return Err(until);
        }
        if !self.is_asking {
            let wanted = self.hand.wanted(room, now);
            let arguments = self.rules.arguments(wanted, tokens, self.hand.held());
            // A channel whose other end has gone is found out by `hear`.
            self.is_asking = self.questions.try_send(arguments).is_ok();
        }
        Err(now + OVERDUE)
    }

    /// Takes in the answer that has come, if one has.
    pub(crate) fn poll_event(&mut self) -> Option<LimiterEvent> {
        let (at, answer) = match self.answers.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                (Instant::now(), Err("its connection has failed".into()))
            }
        };
        self.is_asking = false;
        match answer {
            Ok(charged) => {
                self.not_before = (charged.requests + charged.tokens == 0)
                    .then(|| at + charged.wait.min(LONGEST_WAIT));
                self.hand.add(charged.requests, charged.tokens, at);
                let silence = self.silence.take()?;
                Some(LimiterEvent::Back(at - silence.since))
            }
            Err(reason) => self.fail(at, reason),
        }
    }

    fn fail(&mut self, now: Instant, reason: String) -> Option<LimiterEvent> {
        let is_new = self.silence.is_none();
        let silence = self.silence.get_or_insert(RedisOutage {
            since: now,
            pause: FIRST_PAUSE,
        });
        let lasted = now - silence.since;
        if lasted >= self.patience {
            return Some(LimiterEvent::Over(lasted, reason));
        }
        // The last attempt is made when the patience is at its end.
        self.not_before = Some(now + silence.pause.min(self.patience - lasted));
        silence.pause = (silence.pause * 2).min(LONGEST_PAUSE);
        is_new.then_some(LimiterEvent::Silent(reason))
    }

    /// The server cannot be asked.
    pub(crate) fn is_silent(&self) -> bool {
        self.silence.is_some()
    }
}

/// Puts the questions to the server, one after the other, for as long as anybody has one.
async fn answer_all(
    mut connection: Connection,
    mut asked: Receiver<Arguments>,
    answer: Sender<Answer>,
    wake: Arc<Notify>,
) {
    while let Some(arguments) = asked.recv().await {
        let charged = connection.ask(&arguments).await.map(SharedCharge::new);
        if answer.send((Instant::now(), charged)).await.is_err() {
            return;
        }
        wake.notify_one();
    }
}
