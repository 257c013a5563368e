//! What a request may use and what an answer cost. Pure.

use jiff::civil::Date;

use crate::cache::usage::Usage;
use crate::config::Price;

/// Tokens of a prompt, about, as a rate limit counts them before the answer: four bytes to a token,
/// on the whole body.
pub fn estimate_prompt(body_bytes: usize) -> u64 {
    body_bytes.div_ceil(4) as u64
}

/// The most tokens that a request can use.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenBound {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl TokenBound {
    /// Of a request: no tokenizer makes more tokens of a text than it has bytes, and an endpoint
    /// adds a few around each message. The body holds every message, and JSON only lengthens it.
    pub fn for_request(body_bytes: usize, messages: usize, max_tokens: u32) -> TokenBound {
        TokenBound {
            input_tokens: body_bytes as u64 + 8 * messages as u64,
            output_tokens: max_tokens.into(),
        }
    }

    /// US dollars; None without a price for input and output.
    pub fn cost(&self, price: &Price) -> Option<f64> {
        let usage = Usage {
            prompt_tokens: self.input_tokens,
            completion_tokens: self.output_tokens,
            ..Usage::default()
        };
        cost(&usage, price)
    }
}

/// US dollars; None without a price for input and output.
pub fn cost(usage: &Usage, price: &Price) -> Option<f64> {
    let (input, output) = (price.input?, price.output?);
    let cached_input = price.cached_input.unwrap_or(input);
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    let fresh = usage.prompt_tokens - cached;
    let per_million = fresh as f64 * input
        + cached as f64 * cached_input
        + usage.completion_tokens as f64 * output;
    Some(per_million / 1e6)
}

/// Prices that were read longer ago may have changed.
const OLD_AFTER_DAYS: i32 = 90;

/// Why these prices should be looked at again.
pub fn price_warning(price: &Price, teacher: &str, today: Date) -> Option<String> {
    let Some(date) = price
        .as_of
        .as_ref()
        .and_then(|date| date.parse::<Date>().ok())
    else {
        return Some(format!(
            "the prices of {teacher} have no date: set `price.as_of` to the day on which they were \
             read"
        ));
    };
    let days = date.until(today).ok()?.get_days();
    (days > OLD_AFTER_DAYS).then(|| {
        format!(
            "the prices of {teacher} were read {days} days ago: check them, and set `price.as_of` to \
             the day of that"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_without_a_date_and_old_ones_are_doubted() {
        let today = "2026-11-22".parse().unwrap();
        let of = |as_of: Option<&str>| {
            let price = Price {
                as_of: as_of.map(String::from),
                ..Price::default()
            };
            price_warning(&price, "m", today)
        };
        assert_eq!(of(Some("2026-11-22")), None);
        assert_eq!(of(Some("2026-08-24")), None);
        assert_eq!(of(Some("2027-01-01")), None);
        assert!(of(Some("2026-08-23")).unwrap().contains("91 days ago"));
        assert!(of(None).unwrap().contains("no date"));
    }

    #[test]
    fn prompts_are_rounded_up() {
        assert_eq!([0, 1, 8, 9].map(estimate_prompt), [0, 1, 2, 3]);
    }

    #[test]
    fn cost_counts_cached_input_apart_and_needs_both_prices() {
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
