//! Entry points for the fuzz targets of `tests/fuzz`: replies of a teacher as bytes. Not part of the public
//! interface.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;
use tokio::time::Instant;

use super::record::record;
use crate::cache::line;
use crate::cache::record::Timing;
use crate::cache::usage::Usage;
use crate::client::outcome;
use crate::client::request::RequestTemplate;
use crate::client::transport::HttpReply;
use crate::config::{Config, LimitsConfig};
use crate::plan::PlannedRow;
use crate::prompt::Prompt;
use crate::prompt::message::Message;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::headers;
use crate::rate_limit::pacer::Pacer;

/// Parses a reply and checks that every accepted answer survives encoding and decoding by the cache. The first byte
/// selects the status; the other bytes are the body.
pub fn reply(bytes: &[u8]) {
    const STATUSES: [u16; 8] = [200, 200, 200, 400, 401, 404, 429, 500];
    let Some((status, body)) = bytes.split_first() else {
        return;
    };
    let status = STATUSES[usize::from(*status) % STATUSES.len()];
    let reply = HttpReply::without_headers(status, body.to_vec().into());
    let Ok(completion) = outcome::classify(Ok(reply), SystemTime::UNIX_EPOCH) else {
        return;
    };
    let Some(upstream) = Config::default().endpoints().pop() else {
        return;
    };
    let row = PlannedRow {
        prompt: 0,
        sample: 0,
        key: "key".into(),
        old_key: None,
        bytes: 0,
    };
    let prompt = Prompt::plain("id", vec![Message::new("user", "hello")]);
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
    let timing = Timing::default();
    let mut record = record(
        &RequestTemplate::plain(upstream),
        &row,
        &prompt,
        body,
        *completion,
        timing,
    );
    // The cache stores a missing usage as zeros.
    record.usage = record.usage.filter(|usage| *usage != Usage::default());
    match line::encode(&record) {
        Ok(line) => {
            let line = line.trim_ascii_end();
            assert!(line::verify(line).is_ok() && line::head(line).is_ok());
            assert_eq!(line::decode(line), Ok(record));
        }
        Err(error) => panic!("{error:#}"),
    }
}

/// Parses the header lines of up to eight replies, separated by blank lines, and checks that no reported limit is
/// negative or infinite.
pub fn limits(bytes: &[u8]) {
    const ONE: RequestCost = RequestCost {
        input_tokens: 1,
        output_tokens: 1,
    };
    let daily_limit = DailyLimit::new(None, &[], Instant::now());
    let Ok(mut limiter) = Pacer::new(&LimitsConfig::default(), ONE, daily_limit, None) else {
        return;
    };
    let text = String::from_utf8_lossy(bytes);
    for reply in text.split("\n\n").take(8) {
        let headers: HeaderMap = reply
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter_map(|(name, value)| {
                let name: HeaderName = name.trim().parse().ok()?;
                Some((name, HeaderValue::from_bytes(value.trim().as_bytes()).ok()?))
            })
            .collect();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let reports = headers::parse(&headers, now);
        for report in &reports {
            let figures = [report.limit, report.remaining];
            assert!(
                figures
                    .into_iter()
                    .flatten()
                    .all(|figure| figure >= 0.0 && figure.is_finite())
            );
        }
        if let Ok(ticket) = limiter.admit(ONE, 1) {
            limiter.update_from_headers(&reports, &ticket);
            limiter.answered(&reports, &ticket, Some(ONE));
        }
        let (requests, tokens) = limiter.per_minute();
        assert!(
            requests.is_none_or(|limit| limit >= 0.0) && tokens.is_none_or(|limit| limit >= 0.0)
        );
    }
}
