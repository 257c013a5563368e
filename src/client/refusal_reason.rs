//! Classifies an error reply by its status, error code and message: rate limit, temporary failure, or refusal of the
//! request or of every request. Pure.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};

use crate::client::attempt_error::{
    AttemptError, EndpointRefusal, RefusalReason, RowFailure, shorten,
};
use crate::client::response::error::ApiError;
use crate::client::retry_after;
use crate::rate_limit::headers;

/// Classifies an error. Error codes and messages that name a reason take precedence over the status.
pub(crate) fn classify_error(
    status: u16,
    headers: &HeaderMap,
    error: &ApiError,
    now: SystemTime,
) -> AttemptError {
    let message = match error.message.as_str() {
        "" => format!("{status} without a message"),
        message => shorten(&format!("{status}: {message}")),
    };
    let wait = retry_after::requested_wait(headers, error, now);
    let failure = RowFailure {
        is_bodyless: error.is_empty,
        ..RowFailure::new(format!("http {status}"), &message)
    };
    let endpoint_refused = |reason: RefusalReason, failure: RowFailure| {
        AttemptError::EndpointRefused(EndpointRefusal { reason, failure })
    };
    if matches!(status, 400 | 403 | 422 | 451) && error.is_content_filter() {
        return AttemptError::Filtered(RowFailure {
            class: "content_filter".into(),
            ..failure
        });
    }
    let is_throttle = is_rate_limit(error) || wait.is_some();
    if let Some(reason) = refusal_reason(error, is_throttle) {
        return endpoint_refused(reason, failure);
    }
    match status {
        401 => endpoint_refused(RefusalReason::Key, failure),
        402 => endpoint_refused(RefusalReason::Credit, failure),
        403 if is_throttle => AttemptError::Throttled { wait, message },
        403 => endpoint_refused(RefusalReason::Forbidden, failure),
        400 | 404 | 410 if reports_missing_model(&error.message) => {
            endpoint_refused(RefusalReason::Model, failure)
        }
        404 | 405 | 410 => endpoint_refused(RefusalReason::Address, failure),
        300..=399 => {
            let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.unwrap_or("an unspecified address");
            let message = format!("{status} to {location}");
            endpoint_refused(
                RefusalReason::Redirect,
                RowFailure::new(failure.class, &message),
            )
        }
        // Rate limit statuses of some cloud providers.
        420 | 430 => AttemptError::Throttled { wait, message },
        400 if is_rate_limit(error) || headers.contains_key(RETRY_AFTER) => {
            AttemptError::Throttled { wait, message }
        }
        429 => AttemptError::Throttled {
            wait: wait.or_else(|| until_reset(headers, now)),
            message,
        },
        503 | 529 if wait.is_some() => AttemptError::Throttled { wait, message },
        // 424: the backend of the endpoint failed. 498: no capacity at Groq.
        408 | 409 | 424 | 425 | 498 | 500.. => AttemptError::Transient {
            failure: RowFailure {
                // The gateway timed out; its backend may have completed the answer.
                may_be_billed: matches!(status, 408 | 504 | 524),
                ..failure
            },
            wait: wait.unwrap_or_default(),
        },
        _ => AttemptError::Refused(failure),
    }
}

/// Returns the longest reset time of the exhausted limits in the headers of the reply.
fn until_reset(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let reports = headers::parse(headers, now);
    let exhausted = reports
        .iter()
        .filter(|report| report.remaining == Some(0.0));
    exhausted.filter_map(|report| report.reset).max()
}

/// Returns the reason why every request would fail, from the error's code or message. With a rate limit
/// (`is_throttle`), credit messages do not count: Gemini uses the message of an empty account for its
/// per-minute limit.
pub(crate) fn refusal_reason(error: &ApiError, is_throttle: bool) -> Option<RefusalReason> {
    const CREDIT: [&str; 8] = [
        "insufficient_quota",
        "billing_hard_limit_reached",
        "insufficient_credits",
        "insufficient_balance",
        "billing_not_active",
        "account_deactivated",
        "arrearage",
        "accountoverdueerror",
    ];
    const KEY: [&str; 3] = ["api_key_invalid", "invalid_api_key", "expired_api_key"];
    const KEY_WORDS: [&str; 3] = ["api key expired", "api key not valid", "invalid api key"];
    const MODEL: [&str; 4] = [
        "model_not_found",
        "invalid_model",
        "model_decommissioned",
        "model_not_available",
    ];
    const CREDIT_WORDS: [&str; 8] = [
        "credit balance is too low",
        "insufficient credits",
        "insufficient balance",
        "account is not active",
        "account is in good standing",
        "exceeded your current quota",
        "check your plan and billing",
        "add credits",
    ];
    let has_code = |code: &str| error.codes.iter().any(|reported| reported == code);
    if CREDIT.iter().any(|code| has_code(code)) {
        return Some(RefusalReason::Credit);
    }
    if MODEL.iter().any(|code| has_code(code)) {
        return Some(RefusalReason::Model);
    }
    let message = error.message.to_lowercase();
    let has_key_words = KEY_WORDS.iter().any(|words| message.contains(words));
    if has_key_words || KEY.iter().any(|code| has_code(code)) {
        return Some(RefusalReason::Key);
    }
    let has_words = CREDIT_WORDS.iter().any(|words| message.contains(words));
    (has_words && !is_throttle).then_some(RefusalReason::Credit)
}

/// Returns true if the error's code or message describes a rate limit.
fn is_rate_limit(error: &ApiError) -> bool {
    const CODES: [&str; 4] = ["resource_exhausted", "rate_limit", "ratelimit", "throttl"];
    const WORDS: [&str; 7] = [
        "rate limit",
        "per minute",
        "per_minute",
        "perminute",
        "per second",
        "per day",
        "too many requests",
    ];
    let message = error.message.to_lowercase();
    (error.codes.iter()).any(|code| CODES.iter().any(|part| code.contains(part)))
        || WORDS.iter().any(|words| message.contains(words))
}

/// Returns true if the message reports that the model is missing or retired. "Model" must be the subject of that
/// phrase, since messages mention models for many other reasons.
fn reports_missing_model(message: &str) -> bool {
    const NO_MODEL: [&str; 6] = [
        "unknown model",
        "no such model",
        "not a valid model",
        "not found the model",
        "model identifier is invalid",
        "no endpoints found for",
    ];
    /// Nouns after "model" that name a part of a request or reply instead.
    const PARTS: [&str; 12] = [
        "adapter",
        "config",
        "context",
        "file",
        "input",
        "inputs",
        "output",
        "parameter",
        "prompt",
        "provider",
        "response",
        "weights",
    ];
    /// Words that may follow "invalid model".
    const AFTER_INVALID_MODEL: [&str; 5] = ["", "name", "id", "specified", "requested"];
    const MISSING: [&str; 8] = [
        "not found",
        "not exist",
        "decommissioned",
        "retired",
        "no longer supported",
        "no longer available",
        "deprecated",
        "not available",
    ];
    /// Words that may stand between "model" and a phrase of `MISSING`. One other word, the model's name, may stand
    /// there as well.
    const FILLERS: [&str; 14] = [
        "",
        "is",
        "was",
        "has",
        "have",
        "been",
        "does",
        "did",
        "do",
        "could",
        "be",
        "you",
        "requested",
        "specified",
    ];
    let message = message.to_lowercase();
    let words: Vec<&str> = message.split_whitespace().collect();
    let message = words.join(" ");
    let is_invalid = message.split("invalid model").skip(1).any(|after| {
        let is_whole_word = after.is_empty() || after.starts_with([' ', ':', '.']);
        let word = after.trim_start_matches([' ', ':']).split(' ').next();
        let word = word.unwrap_or_default().trim_end_matches([':', ',', '.']);
        let is_name = word.contains(['`', '\'', '"', '=', '-', '.', '/']);
        is_whole_word && (is_name || after.starts_with(':') || AFTER_INVALID_MODEL.contains(&word))
    });
    let is_missing = message.match_indices("model").any(|(start, model)| {
        let after = &message[start + model.len()..];
        let begins_word = !message[..start].ends_with(char::is_alphanumeric);
        if !begins_word || !after.starts_with([' ', ':', '`', '"', '\'', '/', 's']) {
            return false;
        }
        let phrase_starts = MISSING.iter().filter_map(|words| after.find(words));
        phrase_starts.min().is_some_and(|phrase_start| {
            let between = after[..phrase_start].trim();
            let words = between.split_whitespace();
            let others: Vec<&str> = words.filter(|word| !FILLERS.contains(word)).collect();
            let names_a_part = others.iter().any(|word| PARTS.contains(word));
            !between.contains(", ") && others.len() <= 1 && !names_a_part
        })
    });
    is_invalid || is_missing || NO_MODEL.iter().any(|words| message.contains(words))
}
