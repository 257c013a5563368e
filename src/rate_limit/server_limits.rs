//! The server's own limits, as its headers tell them: one bucket for each thing that it counts.
//!
//! A reply's headers are as old as its request. What has left since is taken off and what has
//! flowed back since is added, so the belief is right whether the server counted when the request
//! came in or when the answer went out, as long as we send about as much as the limit lets in.

use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::send_ticket::SendTicket;
use tokio::time::Instant;

use crate::rate_limit::bucket::ServerBucket;
use crate::rate_limit::headers::{LimitReport, Resource};

#[derive(Debug)]
pub(crate) struct ServerLimits {
    buckets: [ServerBucket; Resource::ALL.len()],
}

impl ServerLimits {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            buckets: Resource::ALL.map(|_| ServerBucket::new(now)),
        }
    }

    /// Whether a request may leave as far as the server's limits go; if not, when to ask again.
    pub(crate) fn check(&self, cost: &RequestCost, now: Instant) -> Result<(), Instant> {
        let waits = self.each(cost).filter_map(|(bucket, amount)| {
            let until = bucket.free_at(amount, now);
            (until > now).then_some(until)
        });
        waits.max().map_or(Ok(()), Err)
    }

    /// Takes note that the request leaves.
    pub(crate) fn charge(&mut self, cost: RequestCost, now: Instant) -> SendTicket {
        let mut charged = [0.0; Resource::ALL.len()];
        for (index, resource) in Resource::ALL.into_iter().enumerate() {
            let bucket = &mut self.buckets[index];
            bucket.charge(cost.get(resource), now);
            charged[index] = bucket.charged;
        }
        SendTicket {
            at: now,
            cost,
            charged,
        }
    }

    /// Believes what the reply to `departure` says.
    pub(crate) fn sync(&mut self, reports: &[LimitReport], departure: &SendTicket, now: Instant) {
        for report in reports {
            let index = report.resource as usize;
            self.buckets[index].sync(report, departure, departure.charged[index], now);
        }
    }

    /// Gives back what was charged for tokens that were not used, where the reply did not say
    /// what remains.
    pub(crate) fn refund(
        &mut self,
        departure: &SendTicket,
        used: &RequestCost,
        reports: &[LimitReport],
    ) {
        for (index, resource) in Resource::ALL.into_iter().enumerate() {
            let told = reports
                .iter()
                .any(|report| report.resource == resource && report.remaining.is_some());
            let unused = departure.cost.get(resource) - used.get(resource);
            let bucket = &mut self.buckets[index];
            if !told && unused > 0.0 && resource != Resource::Requests {
                bucket.level += unused;
                bucket.charged -= unused;
            }
        }
    }

    /// The limits known, with what they grant in a minute.
    pub(crate) fn per_minute(&self) -> impl Iterator<Item = (Resource, f64)> {
        Resource::ALL
            .into_iter()
            .zip(&self.buckets)
            .filter_map(|(resource, bucket)| {
                let per_minute = bucket.limit? / bucket.period().as_secs_f64() * 60.0;
                bucket.as_of.map(|_| (resource, per_minute))
            })
    }

    /// The limit that is too small for a request of this cost, however long it waits.
    pub(crate) fn too_small(&self, cost: &RequestCost) -> Option<(Resource, f64)> {
        let known = Resource::ALL.into_iter().zip(&self.buckets);
        known
            .filter(|(resource, _)| *resource != Resource::Requests)
            .filter_map(|(resource, bucket)| Some((resource, bucket.limit?)))
            .find(|(resource, limit)| cost.get(*resource) > *limit)
    }

    fn each(&self, cost: &RequestCost) -> impl Iterator<Item = (&ServerBucket, f64)> {
        Resource::ALL
            .into_iter()
            .zip(&self.buckets)
            .map(|(resource, bucket)| (bucket, cost.get(resource)))
            .filter(|(bucket, _)| bucket.as_of.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limit::headers;
    use reqwest::header::HeaderMap;
    use std::time::{Duration, SystemTime};

    fn reports(limit: &str, remaining: &str, reset: &str) -> Vec<LimitReport> {
        let mut headers = HeaderMap::new();
        for (name, value) in [("limit", limit), ("remaining", remaining), ("reset", reset)] {
            if !value.is_empty() {
                let name: reqwest::header::HeaderName =
                    format!("x-ratelimit-{name}-requests").parse().unwrap();
                headers.insert(name, value.parse().unwrap());
            }
        }
        headers::parse(&headers, SystemTime::UNIX_EPOCH)
    }

    const ONE: RequestCost = RequestCost {
        input_tokens: 0,
        output_tokens: 0,
    };

    fn after(now: Instant, seconds: f64) -> Instant {
        now + Duration::from_secs_f64(seconds)
    }

    /// How many leave in the `seconds` from `start` when nothing but the mirror holds them.
    fn departures(mirror: &mut ServerLimits, start: Instant, seconds: f64) -> u32 {
        let (mut now, mut count) = (start, 0);
        while now < after(start, seconds) {
            match mirror.check(&ONE, now) {
                Ok(()) => {
                    mirror.charge(ONE, now);
                    count += 1;
                }
                Err(until) => now = until,
            }
        }
        count
    }

    #[test]
    fn a_server_that_says_nothing_holds_nothing_back() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        for _ in 0..10_000 {
            mirror.check(&ONE, now).unwrap();
            mirror.charge(ONE, now);
        }
        assert_eq!(mirror.per_minute().count(), 0);
    }

    #[test]
    fn an_empty_bucket_is_used_at_its_rate_and_a_full_one_over_about_a_minute() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        let departure = mirror.charge(ONE, now);
        mirror.sync(&reports("600", "0", "60s"), &departure, now);
        let count = departures(&mut mirror, now, 60.0);
        assert!((590..=611).contains(&count), "{count}");
        assert_eq!(
            mirror.per_minute().next(),
            Some((Resource::Requests, 600.0))
        );

        let mut mirror = ServerLimits::new(now);
        let departure = mirror.charge(ONE, now);
        mirror.sync(&reports("600", "599", "100ms"), &departure, now);
        let first = departures(&mut mirror, now, 1.0);
        assert!((20..=45).contains(&first), "{first} in the first second");
        let count = first + departures(&mut mirror, after(now, 1.0), 59.0);
        assert!((900..=1_200).contains(&count), "{count}");
    }

    #[test]
    fn what_has_left_since_is_taken_off_and_older_replies_are_not_believed() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        let first = mirror.charge(ONE, now);
        let second = mirror.charge(ONE, after(now, 0.1));
        for _ in 0..4 {
            mirror.charge(ONE, after(now, 0.1));
        }
        let reply = after(now, 0.1);
        mirror.sync(&reports("60", "5", "55s"), &second, reply);
        assert!((mirror.buckets[0].level(reply) - 1.0).abs() < 1e-9);
        mirror.sync(&reports("60", "59", "1s"), &first, reply);
        assert!((mirror.buckets[0].level(reply) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_left_of_a_limit_that_is_not_told_holds_back_until_its_reset_alone() {
        let now = Instant::now();
        for (limit, reset, seconds) in [("", "", 0.0), ("", "2s", 2.0), ("0", "2s", 2.0)] {
            let mut mirror = ServerLimits::new(now);
            let departure = mirror.charge(ONE, now);
            mirror.sync(&reports(limit, "0", reset), &departure, now);
            let until = mirror.check(&ONE, now).err().unwrap_or(now);
            assert_eq!(until, after(now, seconds));
            let then = after(now, seconds);
            for _ in 0..1_000 {
                mirror.check(&ONE, then).unwrap();
                mirror.charge(ONE, then);
            }
            assert_eq!(mirror.too_small(&ONE), None);
        }
    }

    #[test]
    fn the_length_of_a_window_is_that_of_its_policy() {
        let now = Instant::now();
        let mut headers = HeaderMap::new();
        headers.insert("ratelimit", "\"d\";r=0;t=2".parse().unwrap());
        headers.insert("ratelimit-policy", "\"d\";q=5;w=2".parse().unwrap());
        let reports = headers::parse(&headers, SystemTime::UNIX_EPOCH);
        let mut mirror = ServerLimits::new(now);
        let departure = mirror.charge(ONE, now);
        mirror.sync(&reports, &departure, now);
        let count = departures(&mut mirror, now, 62.0);
        assert!(
            (100..=160).contains(&count),
            "{count} in 60 s, of 5 every 2 s"
        );
    }

    #[test]
    fn limits_that_change_are_followed() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        let departure = mirror.charge(ONE, now);
        mirror.sync(&reports("600", "0", "60s"), &departure, now);
        let departure = mirror.charge(ONE, after(now, 1.0));
        mirror.sync(&reports("60", "0", "60s"), &departure, after(now, 1.0));
        let count = departures(&mut mirror, after(now, 1.0), 60.0);
        assert!((55..=62).contains(&count), "{count}");
    }

    #[test]
    fn a_window_that_is_used_up_is_waited_for() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        let departure = mirror.charge(ONE, now);
        mirror.sync(&reports("100", "0", "20"), &departure, now);
        assert_eq!(mirror.check(&ONE, now), Err(after(now, 20.0)));
        assert_eq!(mirror.check(&ONE, after(now, 20.0)), Ok(()));
    }

    /// A server with `size` units and 50 a second more, 3,000 a minute as it says, whose replies take
    /// a second: what leaves in two minutes, and how much of it is refused.
    fn two_minutes(size: f64) -> (u32, u32) {
        let start = Instant::now();
        let mut mirror = ServerLimits::new(start);
        let (mut server, mut at) = (size, start);
        let mut replies = std::collections::VecDeque::new();
        let (mut now, mut sent, mut refused) = (start, 0, 0);
        while now < after(start, 120.0) {
            let until = match mirror.check(&ONE, now) {
                // Until the first reply has come, one goes.
                Ok(()) if sent == 0 || mirror.buckets[0].as_of.is_some() => {
                    let departure = mirror.charge(ONE, now);
                    server = (server + 50.0 * (now - at).as_secs_f64()).min(size);
                    at = now;
                    sent += 1;
                    match server >= 1.0 {
                        true => server -= 1.0,
                        false => refused += 1,
                    }
                    let reset = format!("{:.0}ms", (size - server) / 50.0 * 1e3);
                    let report = reports("3000", &format!("{}", server.floor()), &reset);
                    replies.push_back((after(now, 1.0), departure, report));
                    continue;
                }
                Ok(()) => replies[0].0,
                Err(until) => replies.front().map_or(until, |reply| until.min(reply.0)),
            };
            now = until;
            while replies.front().is_some_and(|reply| reply.0 <= now) {
                let Some((_, departure, report)) = replies.pop_front() else {
                    break;
                };
                mirror.sync(&report, &departure, now);
            }
        }
        (sent, refused)
    }

    #[test]
    fn a_bucket_of_a_second_is_no_window_that_ends_all_the_time() {
        let (sent, refused) = two_minutes(50.0);
        assert!(sent >= 5_900, "{sent}");
        assert!(refused * 50 <= sent, "{refused} of {sent} are refused");
    }

    #[test]
    fn unused_tokens_come_back_where_the_server_does_not_count_them_itself() {
        let now = Instant::now();
        let mut mirror = ServerLimits::new(now);
        let cost = RequestCost {
            input_tokens: 10,
            output_tokens: 90,
        };
        let report = |remaining: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-ratelimit-limit-tokens", "1000".parse().unwrap());
            if !remaining.is_empty() {
                headers.insert("x-ratelimit-remaining-tokens", remaining.parse().unwrap());
            }
            headers::parse(&headers, SystemTime::UNIX_EPOCH)
        };
        let departure = mirror.charge(cost, now);
        let used = RequestCost {
            input_tokens: 10,
            output_tokens: 40,
        };
        mirror.sync(&report("500"), &departure, now);
        mirror.refund(&departure, &used, &report("500"));
        let tokens = Resource::Tokens as usize;
        assert_eq!(mirror.buckets[tokens].level(now), 500.0);
        let departure = mirror.charge(cost, now);
        mirror.refund(&departure, &used, &report(""));
        assert_eq!(mirror.buckets[tokens].level(now), 450.0);
        let huge = RequestCost {
            input_tokens: 2_000,
            output_tokens: 0,
        };
        assert_eq!(mirror.too_small(&huge), Some((Resource::Tokens, 1000.0)));
        assert_eq!(mirror.too_small(&cost), None);
    }
}
