//! Token bounds of requests, and the cost of answers. Pure.

use jiff::civil::Date;

use crate::cache::usage::Usage;
use crate::config::Price;

/// Number of bytes of a request body per token, as endpoints estimate it.
const BYTES_PER_TOKEN: usize = 4;

/// Upper bound of the tokens that an endpoint adds to each message.
const MAX_TOKENS_PER_MESSAGE: u64 = 8;

/// Estimates the tokens of a prompt as rate limits count them before the answer. `body_bytes` is the length of the
/// request body.
pub(crate) fn estimate_prompt(body_bytes: usize) -> u64 {
    body_bytes.div_ceil(BYTES_PER_TOKEN) as u64
}

/// Upper bound of the tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenBound {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl TokenBound {
    /// Returns the bound for a request with `messages` messages. A text has at most as many tokens as bytes, and the
    /// JSON body of `body_bytes` bytes is longer than the messages in it.
    pub(crate) fn for_request(body_bytes: usize, messages: usize, max_tokens: u32) -> TokenBound {
        TokenBound {
            input_tokens: body_bytes as u64 + MAX_TOKENS_PER_MESSAGE * messages as u64,
            output_tokens: max_tokens.into(),
        }
    }

    /// Returns the cost in US dollars; None unless the prices of input and output are both set.
    pub fn cost(&self, price: &Price) -> Option<f64> {
        let usage = Usage {
            prompt_tokens: self.input_tokens,
            completion_tokens: self.output_tokens,
            ..Usage::default()
        };
        cost(&usage, price)
    }
}

/// Returns the cost of a usage in US dollars; None unless the prices of input and output are both set. Without a price
/// for cached input, cached tokens cost as much as other prompt tokens.
pub fn cost(usage: &Usage, price: &Price) -> Option<f64> {
    let input = price.input?;
    let output = price.output?;
    let cached_input = price.cached_input.unwrap_or(input);
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    let uncached = usage.prompt_tokens - cached;
    let microdollars = uncached as f64 * input
        + cached as f64 * cached_input
        + usage.completion_tokens as f64 * output;
    Some(microdollars / 1e6)
}

/// Age in days after which [`price_warning`] reports prices as old.
const MAX_PRICE_AGE_DAYS: i32 = 90;

/// Returns a warning if the prices of `teacher` have no date or are older than [`MAX_PRICE_AGE_DAYS`].
pub(crate) fn price_warning(price: &Price, teacher: &str, today: Date) -> Option<String> {
    let Some(date) = &price.as_of else {
        return Some(format!(
            "the prices of {teacher} have no date: set `price.as_of` to the day on which you looked them up"
        ));
    };
    let days = date.until(today).ok()?.get_days();
    (days > MAX_PRICE_AGE_DAYS).then(|| {
        format!(
            "the prices of {teacher} were looked up {days} days ago: check them, and set `price.as_of` to today"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn price_warning_for_missing_and_old_dates() {
        let today = "2026-11-22".parse().unwrap();
        let warning = |as_of: Option<&str>| {
            let price = Price {
                as_of: as_of.map(|date| date.parse().unwrap()),
                ..Price::default()
            };
            price_warning(&price, "m", today)
        };
        assert_eq!(warning(Some("2026-11-22")), None);
        assert_eq!(warning(Some("2026-08-24")), None);
        assert_eq!(warning(Some("2027-01-01")), None);
        assert!(warning(Some("2026-08-23")).unwrap().contains("91 days ago"));
        assert!(warning(None).unwrap().contains("no date"));
    }

    #[test]
    fn estimate_prompt_rounds_up() {
        assert_eq!([0, 1, 8, 9].map(estimate_prompt), [0, 1, 2, 3]);
    }

    #[test]
    fn cost_prices_cached_input_separately_and_needs_both_prices() {
        let usage = Usage {
            prompt_tokens: 1_000_000,
            completion_tokens: 500_000,
            cached_tokens: 400_000,
            reasoning_tokens: 100_000,
        };
        let mut price = Price {
            input: Some(2.0),
            output: Some(8.0),
            ..Price::default()
        };
        assert_eq!(cost(&usage, &price), Some(6.0));
        price.cached_input = Some(0.5);
        assert_eq!(cost(&usage, &price), Some(1.2 + 0.2 + 4.0));
        price.output = None;
        assert_eq!(cost(&usage, &price), None);
    }
}
