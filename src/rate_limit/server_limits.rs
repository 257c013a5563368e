//! [`ServerLimits`]: the server's limits as its headers report them, one bucket per resource and period. Pure.
//!
//! The values in a reply are as old as its request. Amounts charged since then are subtracted, and amounts refilled
//! since then are added. As long as the send rate is close to the limit, the estimate is right for servers that count a
//! request when it arrives, and for servers that count it when they answer.

use tokio::time::Instant;

use crate::rate_limit::bucket::ServerBucket;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::headers::{LIMITS_PER_RESOURCE, LimitReport, Resource};
use crate::rate_limit::send_ticket::SendTicket;

/// Buckets of the server's limits. A server may report several limits of one resource, for example per minute and per
/// day, each with a bucket of its own.
#[derive(Debug)]
pub(crate) struct ServerLimits {
    /// The first limit of each resource, then the second one of each, and so on; see
    /// [`LimitReport::index_in_resource`].
    buckets: [ServerBucket; Resource::ALL.len() * LIMITS_PER_RESOURCE],
}

impl ServerLimits {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            buckets: std::array::from_fn(|_| ServerBucket::new(now)),
        }
    }

    /// Checks that the server's limits allow a request.
    ///
    /// # Errors
    /// The instant at which to try again.
    pub(crate) fn check(&self, cost: &RequestCost, now: Instant) -> Result<(), Instant> {
        let later = self.reported_buckets(cost).filter_map(|(bucket, amount)| {
            let send_at = bucket.earliest_send(amount, now);
            (send_at > now).then_some(send_at)
        });
        later.max().map_or(Ok(()), Err)
    }

    /// Charges a request that is sent.
    pub(crate) fn charge(&mut self, cost: RequestCost, now: Instant) -> SendTicket {
        let mut charged = [0.0; Resource::ALL.len() * LIMITS_PER_RESOURCE];
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            bucket.charge(cost.get(resource_of(index)), now);
            charged[index] = bucket.charged;
        }
        SendTicket {
            sent_at: now,
            cost,
            charged,
        }
    }

    /// Updates the buckets from the reply to the request of `ticket`.
    pub(crate) fn sync(&mut self, reports: &[LimitReport], ticket: &SendTicket, now: Instant) {
        for report in reports {
            let index = index_of(report);
            self.buckets[index].sync(report, ticket, ticket.charged[index], now);
        }
    }

    /// Refunds tokens that were charged but not used, unless the reply reports the remaining amount.
    pub(crate) fn refund(
        &mut self,
        ticket: &SendTicket,
        used: &RequestCost,
        reports: &[LimitReport],
    ) {
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            let is_reported = reports
                .iter()
                .any(|report| index_of(report) == index && report.remaining.is_some());
            let resource = resource_of(index);
            let unused = ticket.cost.get(resource) - used.get(resource);
            if !is_reported && unused > 0.0 && resource != Resource::Requests {
                bucket.level += unused;
                bucket.charged -= unused;
            }
        }
    }

    /// Returns the limits that the server has reported, in units per minute.
    pub(crate) fn per_minute(&self) -> impl Iterator<Item = (Resource, f64)> {
        self.buckets_with_resource()
            .filter_map(|(resource, bucket)| {
                let per_minute = bucket.limit? / bucket.period().as_secs_f64() * 60.0;
                bucket.last_report_sent_at.map(|_| (resource, per_minute))
            })
    }

    /// Returns a limit of tokens that is smaller than the cost of the request, if there is one.
    pub(crate) fn limit_smaller_than(&self, cost: &RequestCost) -> Option<(Resource, f64)> {
        self.buckets_with_resource()
            .filter(|(resource, _)| *resource != Resource::Requests)
            .filter_map(|(resource, bucket)| Some((resource, bucket.limit?)))
            .find(|(resource, limit)| cost.get(*resource) > *limit)
    }

    /// Returns the buckets that the server has reported, each with the amount that the request uses.
    fn reported_buckets(&self, cost: &RequestCost) -> impl Iterator<Item = (&ServerBucket, f64)> {
        self.buckets_with_resource()
            .map(|(resource, bucket)| (bucket, cost.get(resource)))
            .filter(|(bucket, _)| bucket.last_report_sent_at.is_some())
    }

    fn buckets_with_resource(&self) -> impl Iterator<Item = (Resource, &ServerBucket)> {
        let buckets = self.buckets.iter().enumerate();
        buckets.map(|(index, bucket)| (resource_of(index), bucket))
    }
}

/// Returns the resource of the bucket at `index`.
fn resource_of(index: usize) -> Resource {
    Resource::ALL[index % Resource::ALL.len()]
}

/// Returns the index of the bucket of a report.
fn index_of(report: &LimitReport) -> usize {
    report.index_in_resource() * Resource::ALL.len() + report.resource as usize
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

    /// Returns the number of requests that `limits` admits within `seconds` of `start`.
    fn count_sent(limits: &mut ServerLimits, start: Instant, seconds: f64) -> u32 {
        let (mut now, mut count) = (start, 0);
        while now < after(start, seconds) {
            match limits.check(&ONE, now) {
                Ok(()) => {
                    limits.charge(ONE, now);
                    count += 1;
                }
                Err(retry_at) => now = retry_at,
            }
        }
        count
    }

    #[test]
    fn server_without_headers_has_no_limits() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        for _ in 0..10_000 {
            limits.check(&ONE, now).unwrap();
            limits.charge(ONE, now);
        }
        assert_eq!(limits.per_minute().count(), 0);
    }

    #[test]
    fn empty_bucket_is_used_at_its_rate_and_a_full_one_within_a_minute() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports("600", "0", "60s"), &ticket, now);
        let count = count_sent(&mut limits, now, 60.0);
        assert!((590..=611).contains(&count), "{count}");
        assert_eq!(
            limits.per_minute().next(),
            Some((Resource::Requests, 600.0))
        );

        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports("600", "599", "100ms"), &ticket, now);
        let first = count_sent(&mut limits, now, 1.0);
        assert!((20..=45).contains(&first), "{first} in the first second");
        let count = first + count_sent(&mut limits, after(now, 1.0), 59.0);
        assert!((900..=1_200).contains(&count), "{count}");
    }

    #[test]
    fn sync_subtracts_later_requests_and_ignores_older_replies() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        let first = limits.charge(ONE, now);
        let second = limits.charge(ONE, after(now, 0.1));
        for _ in 0..4 {
            limits.charge(ONE, after(now, 0.1));
        }
        let replied_at = after(now, 0.1);
        limits.sync(&reports("60", "5", "55s"), &second, replied_at);
        assert!((limits.buckets[0].level(replied_at) - 1.0).abs() < 1e-9);
        limits.sync(&reports("60", "59", "1s"), &first, replied_at);
        assert!((limits.buckets[0].level(replied_at) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn exhausted_limit_of_unknown_size_waits_for_its_reset_only() {
        let now = Instant::now();
        for (limit, reset, seconds) in [("", "", 0.0), ("", "2s", 2.0), ("0", "2s", 2.0)] {
            let mut limits = ServerLimits::new(now);
            let ticket = limits.charge(ONE, now);
            limits.sync(&reports(limit, "0", reset), &ticket, now);
            let retry_at = limits.check(&ONE, now).err().unwrap_or(now);
            assert_eq!(retry_at, after(now, seconds));
            for _ in 0..1_000 {
                limits.check(&ONE, retry_at).unwrap();
                limits.charge(ONE, retry_at);
            }
            assert_eq!(limits.limit_smaller_than(&ONE), None);
        }
    }

    #[test]
    fn limit_applies_when_only_the_reply_that_reports_exhaustion_has_a_reset() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports("", "0", "2s"), &ticket, now);
        let reset_at = after(now, 2.0);
        limits.check(&ONE, reset_at).unwrap();
        let ticket = limits.charge(ONE, reset_at);
        limits.sync(&reports("", "50", ""), &ticket, reset_at);
        let count = count_sent(&mut limits, reset_at, 180.0);
        assert!((120..=220).contains(&count), "{count}");
    }

    #[test]
    fn window_length_is_taken_from_the_policy_header() {
        let now = Instant::now();
        let mut headers = HeaderMap::new();
        headers.insert("ratelimit", "\"d\";r=0;t=2".parse().unwrap());
        headers.insert("ratelimit-policy", "\"d\";q=5;w=2".parse().unwrap());
        let reports = headers::parse(&headers, SystemTime::UNIX_EPOCH);
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports, &ticket, now);
        let count = count_sent(&mut limits, now, 62.0);
        assert!(
            (100..=160).contains(&count),
            "{count} requests in 62 s, with a limit of 5 every 2 s"
        );
    }

    #[test]
    fn limits_per_minute_and_per_day_both_apply() {
        let now = Instant::now();
        // The order of the headers does not matter.
        for periods in [["minute", "day"], ["day", "minute"]] {
            for (exhausted, wait_s) in [("minute", 1.0), ("day", 6.0)] {
                let mut headers = HeaderMap::new();
                for period in periods {
                    let limit = if period == "minute" { "60" } else { "14400" };
                    let remaining = if period == exhausted { "0" } else { limit };
                    for (name, value) in [("limit", limit), ("remaining", remaining)] {
                        let name = format!("x-ratelimit-{name}-requests-{period}");
                        let name: reqwest::header::HeaderName = name.parse().unwrap();
                        headers.insert(name, value.parse().unwrap());
                    }
                }
                let reports = headers::parse(&headers, SystemTime::UNIX_EPOCH);
                let mut limits = ServerLimits::new(now);
                let ticket = limits.charge(ONE, now);
                limits.sync(&reports, &ticket, now);
                let wait = limits.check(&ONE, now).unwrap_err() - now;
                assert!((wait.as_secs_f64() - wait_s).abs() < 0.01, "{wait:?}");
                let per_minute: Vec<f64> = limits.per_minute().map(|limit| limit.1).collect();
                assert_eq!(per_minute, [60.0, 10.0]);
            }
        }
    }

    #[test]
    fn window_of_any_length_is_accepted() {
        let now = Instant::now();
        let mut headers = HeaderMap::new();
        headers.insert("ratelimit", "\"d\";r=0;t=2".parse().unwrap());
        let policy = "\"d\";q=5;w=9223372036854775807";
        headers.insert("ratelimit-policy", policy.parse().unwrap());
        let reports = headers::parse(&headers, SystemTime::UNIX_EPOCH);
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports, &ticket, now);
        let later = after(now, 3.0);
        assert_eq!(limits.check(&ONE, later), Ok(()));
        limits.charge(ONE, later);
    }

    #[test]
    fn lowered_limit_in_the_headers_is_applied() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports("600", "0", "60s"), &ticket, now);
        let ticket = limits.charge(ONE, after(now, 1.0));
        limits.sync(&reports("60", "0", "60s"), &ticket, after(now, 1.0));
        let count = count_sent(&mut limits, after(now, 1.0), 60.0);
        assert!((55..=62).contains(&count), "{count}");
    }

    #[test]
    fn exhausted_window_waits_for_its_end() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
        let ticket = limits.charge(ONE, now);
        limits.sync(&reports("100", "0", "20"), &ticket, now);
        assert_eq!(limits.check(&ONE, now), Err(after(now, 20.0)));
        assert_eq!(limits.check(&ONE, after(now, 20.0)), Ok(()));
    }

    /// Simulates two minutes with a server whose bucket has a capacity of `capacity` requests, refills 50 per second,
    /// and reports a limit of 3,000 per minute. Replies take a second. Returns the number of requests sent, and the
    /// number of requests that the server refused.
    fn simulate_two_minutes(capacity: f64) -> (u32, u32) {
        let start = Instant::now();
        let mut limits = ServerLimits::new(start);
        let mut server_level = capacity;
        let mut server_updated = start;
        let mut replies = std::collections::VecDeque::new();
        let (mut now, mut sent, mut refused) = (start, 0, 0);
        while now < after(start, 120.0) {
            let next_event = match limits.check(&ONE, now) {
                // Before the first reply only one request is sent.
                Ok(()) if sent == 0 || limits.buckets[0].last_report_sent_at.is_some() => {
                    let ticket = limits.charge(ONE, now);
                    server_level =
                        (server_level + 50.0 * (now - server_updated).as_secs_f64()).min(capacity);
                    server_updated = now;
                    sent += 1;
                    if server_level >= 1.0 {
                        server_level -= 1.0;
                    } else {
                        refused += 1;
                    }
                    let reset = format!("{:.0}ms", (capacity - server_level) / 50.0 * 1e3);
                    let report = reports("3000", &format!("{}", server_level.floor()), &reset);
                    replies.push_back((after(now, 1.0), ticket, report));
                    continue;
                }
                Ok(()) => replies[0].0,
                Err(retry_at) => replies
                    .front()
                    .map_or(retry_at, |reply| retry_at.min(reply.0)),
            };
            now = next_event;
            while replies.front().is_some_and(|reply| reply.0 <= now) {
                let Some((_, ticket, report)) = replies.pop_front() else {
                    break;
                };
                limits.sync(&report, &ticket, now);
            }
        }
        (sent, refused)
    }

    #[test]
    fn bucket_with_a_capacity_of_one_second_is_not_treated_as_a_window() {
        let (sent, refused) = simulate_two_minutes(50.0);
        assert!(sent >= 5_900, "{sent}");
        assert!(refused * 50 <= sent, "{refused} of {sent} are refused");
    }

    #[test]
    fn unused_tokens_are_refunded_unless_the_server_reports_the_remaining_amount() {
        let now = Instant::now();
        let mut limits = ServerLimits::new(now);
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
        let ticket = limits.charge(cost, now);
        let used = RequestCost {
            input_tokens: 10,
            output_tokens: 40,
        };
        limits.sync(&report("500"), &ticket, now);
        limits.refund(&ticket, &used, &report("500"));
        let tokens = Resource::Tokens as usize;
        assert_eq!(limits.buckets[tokens].level(now), 500.0);
        let ticket = limits.charge(cost, now);
        limits.refund(&ticket, &used, &report(""));
        assert_eq!(limits.buckets[tokens].level(now), 450.0);
        let huge = RequestCost {
            input_tokens: 2_000,
            output_tokens: 0,
        };
        assert_eq!(
            limits.limit_smaller_than(&huge),
            Some((Resource::Tokens, 1000.0))
        );
        assert_eq!(limits.limit_smaller_than(&cost), None);
    }
}
