//! One teacher in a run: its rows, its limits, its health.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use super::health::Health;
use super::limiter::day::Day;
use super::limiter::headers::Report;
use super::limiter::{Concurrency, Cost, Departure, Limiter, News, Shared};
use super::plan::Plan;
use super::queue::{Entry, Queue};
use super::retry::{self, Failure};
use super::stop;
use super::teacher::Transport;
use crate::cache::record::Usage;
use crate::config;
use crate::terminal::format_duration;

/// Attempts of one row after which an address at which nothing has ever answered is given up.
const FIRST_CONTACT_ATTEMPTS: u32 = 3;

/// The longest pause between the probes of an outage, as a multiple of `retry.max_s`.
const OUTAGE_PAUSE: f64 = 5.0;

pub struct Lane {
    pub settings: config::Lane,
    pub transport: Arc<dyn Transport>,
    pub limiter: Limiter,
    pub queue: Queue,
    health: Health,
    concurrency: Concurrency,
    retry: config::Retry,
    in_flight: usize,
    /// When the request left that alone finds out whether the endpoint is back.
    probe: Option<Instant>,
    /// Why nothing more is sent to it; the other lanes go on.
    stopped: Option<anyhow::Error>,
}

/// What a failed attempt leads to.
pub enum Verdict {
    /// The row is in the queue again; the gate was closed for this long.
    Again { pause: Duration },
    /// The row ends without an answer.
    Failed(Entry, Failure),
}

impl Lane {
    pub fn new(
        plan: &Plan,
        index: usize,
        transport: Arc<dyn Transport>,
        day: Day,
        shared: Option<Shared>,
        retry: &config::Retry,
    ) -> Result<Lane> {
        let settings = plan.askings[index].lane.clone();
        let now = Instant::now();
        let concurrency = settings.limits.concurrency;
        Ok(Lane {
            limiter: Limiter::new(&settings.limits, plan.largest(index), day, shared)?,
            queue: Queue::new(plan.lanes[index].clone()),
            health: Health::new(now),
            concurrency: Concurrency::new(concurrency),
            retry: retry.clone(),
            in_flight: 0,
            probe: None,
            stopped: None,
            settings,
            transport,
        })
    }

    /// Goes on with the rows of another plan.
    ///
    /// # Errors
    /// Where a request could never leave.
    pub fn go_on(&mut self, plan: &Plan, index: usize) -> Result<()> {
        self.limiter.make_room_for(plan.largest(index))?;
        self.queue = Queue::new(plan.lanes[index].clone());
        (self.in_flight, self.probe) = (0, None);
        Ok(())
    }

    /// Nothing more is to be sent.
    pub fn is_done(&self) -> bool {
        self.queue.is_empty() || self.stopped.is_some()
    }

    /// Is there room for one more request? After a closed gate and in an outage, for one alone.
    pub fn has_room(&self) -> bool {
        match self.is_probing() {
            true => self.probe.is_none(),
            false => self.in_flight < self.concurrency.room(),
        }
    }

    fn is_probing(&self) -> bool {
        self.health.is_outage() || self.limiter.is_half_open()
    }

    /// Lets a request out, or says when to ask again.
    pub fn admit(&mut self, cost: Cost) -> Result<Departure, Instant> {
        let room = match self.is_probing() {
            true => 1,
            false => self.concurrency.room().saturating_sub(self.in_flight),
        };
        self.limiter.admit(cost, room.min(self.queue.len()))
    }

    /// What the user is to know of the limits that are shared.
    pub fn hear(&mut self) -> Option<String> {
        match self.limiter.hear()? {
            News::Silent(reason) => Some(format!(
                "waiting: nothing leaves while the limits that are shared cannot be asked for \
                 ({reason})"
            )),
            News::Back(silence) => {
                self.health.excuse(silence);
                let silence = format_duration(silence);
                Some(format!(
                    "the limits that are shared can be asked for again, after {silence}"
                ))
            }
            News::Over(silence, reason) => {
                self.stop(stop::no_shared_limits(silence, &reason));
                None
            }
        }
    }

    pub fn left(&mut self, departure: &Departure) {
        self.in_flight += 1;
        if self.is_probing() {
            self.probe = Some(departure.at);
        }
    }

    /// A reply, or the lack of one, has come.
    pub fn came_back(&mut self, departure: &Departure, reports: &[Report]) {
        self.in_flight -= 1;
        if self.probe == Some(departure.at) {
            self.probe = None;
        }
        if self.limiter.learn(reports, departure) {
            self.concurrency.follow_limits();
        }
    }

    pub fn answered(&mut self, departure: &Departure, reports: &[Report], usage: Option<&Usage>) {
        let now = Instant::now();
        self.health.success(departure.at, now);
        if self.settings.limits.adapt {
            let is_full = self.in_flight + 1 >= self.concurrency.room();
            self.concurrency.answered(departure.at, now, is_full);
        }
        let used = usage.map(|usage| Cost {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
        });
        self.limiter.answered(reports, departure, used);
    }

    /// The endpoint asks everybody to wait: the row costs no attempt, and the gate closes.
    pub fn throttled(
        &mut self,
        mut entry: Entry,
        cost: Cost,
        departure: &Departure,
        wait: Option<Duration>,
        message: String,
    ) -> Verdict {
        let now = Instant::now();
        let streak = self.health.throttled();
        // No wait makes room for a request that is larger than the limit itself.
        let too_small = self.limiter.too_small(&cost);
        if too_small.is_some() || message.to_lowercase().contains("request too large") {
            let which = too_small.map_or("the endpoint's limit".into(), |(resource, limit)| {
                format!("the endpoint's limit of {limit} {}", resource.name())
            });
            let failure = Failure::over_limit(&which, cost.tokens() as f64, &message);
            return Verdict::Failed(entry, failure);
        }
        if self.settings.limits.adapt {
            self.concurrency.throttled(departure.at, now);
        }
        let told = wait.filter(|wait| wait.as_secs_f64() > self.retry.max_s);
        let wait = wait.unwrap_or_else(|| self.firm_pause(streak, 1.0));
        let was_open = self.limiter.close_until(now + wait);
        if was_open && let Some(wait) = told {
            self.health.excuse(wait);
        }
        // It may be the row after all: behind the others with it, the further the oftener.
        let behind = self.firm_pause(entry.throttled, 1.0);
        entry.throttled += 1;
        let behind = if entry.throttled > 1 {
            wait + behind
        } else {
            Duration::ZERO
        };
        self.queue.delay(entry, now + behind);
        self.stop_after_long_silence(&message);
        Verdict::Again {
            // Everything in flight may say the same; once is enough.
            pause: if was_open { wait } else { Duration::ZERO },
        }
    }

    pub fn transient(&mut self, mut entry: Entry, failure: Failure, wait: Duration) -> Verdict {
        let now = Instant::now();
        self.health
            .failure(entry.row, failure.unreachable, self.in_flight + 1, now);
        if self.health.is_outage() && !self.health.never_answered() {
            // No row is to blame: it costs no attempt, and one probe at a time goes out.
            let pause = self
                .firm_pause(self.health.probes(), OUTAGE_PAUSE)
                .max(wait);
            let was_open = self.limiter.close_until(now + pause);
            self.queue.delay(entry, now + wait);
            self.stop_after_long_silence(&failure.message);
            return Verdict::Again {
                pause: if was_open { pause } else { Duration::ZERO },
            };
        }
        entry.failed += 1;
        let max_attempts = self.retry.max_attempts;
        if self.health.never_answered() && entry.failed >= FIRST_CONTACT_ATTEMPTS.min(max_attempts)
        {
            self.stop(stop::nothing_answers(
                &self.settings.teacher,
                &failure.message,
            ));
        } else if entry.failed >= max_attempts {
            // Itself, what waits, and what is on its way.
            let remaining = 1 + self.queue.len() + self.in_flight;
            if !self.health.may_be_the_endpoint(entry.failed, remaining) {
                return Verdict::Failed(entry, failure);
            }
            // Half of its attempts come back: once the endpoint is in order again, one more accident
            // must not end the row.
            entry.failed = (entry.failed - 1).min(max_attempts.div_ceil(2));
        }
        let pause = retry::backoff(entry.failed, &self.retry, fastrand::f64()).max(wait);
        self.queue.delay(entry, now + pause);
        self.stop_after_long_silence(&failure.message);
        Verdict::Again {
            pause: Duration::ZERO,
        }
    }

    pub fn refused(&mut self, mut entry: Entry, failure: Failure) -> Verdict {
        entry.failed += 1;
        if self.health.refused(&failure.message) {
            self.stop(stop::refused_alike(&failure.message));
        }
        Verdict::Failed(entry, failure)
    }

    /// Sends nothing more to this endpoint; its rows stay pending.
    pub fn stop(&mut self, error: anyhow::Error) {
        self.stopped.get_or_insert(error);
    }

    pub fn take_error(&mut self) -> Option<anyhow::Error> {
        self.stopped.take()
    }

    /// A pause for everybody, at least half of which is certain.
    fn firm_pause(&self, attempt: u32, stretch: f64) -> Duration {
        let retry = config::Retry {
            max_s: self.retry.max_s * stretch,
            ..self.retry.clone()
        };
        retry::backoff(attempt, &retry, 0.5 + fastrand::f64() / 2.0)
    }

    /// Judged when something has failed and not by a timer, so that a wait that the endpoint asked
    /// for is waited to its end.
    fn stop_after_long_silence(&mut self, message: &str) {
        let silence = self.health.silence(Instant::now());
        if silence.as_secs_f64() >= self.retry.max_outage_s {
            self.stop(stop::outage(silence, message));
        }
    }

    /// Is the endpoint out of order, or has it asked for a pause?
    pub fn is_waiting(&self) -> bool {
        self.health.is_outage() || self.limiter.is_closed(Instant::now())
    }
}
