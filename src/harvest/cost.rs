//! What a request may use and what an answer cost. Pure.

use crate::cache::record::Usage;
use crate::config::Price;

/// Tokens of a prompt, about: four bytes to a token, counted on the whole body.
pub fn estimate_prompt(body_bytes: usize) -> u64 {
    body_bytes.div_ceil(4) as u64
}

/// Tokens that a rate limit counts for a request before it is answered, as providers do.
pub fn estimate(body_bytes: usize, max_tokens: u32) -> u64 {
    estimate_prompt(body_bytes) + u64::from(max_tokens)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_rounded_up() {
        assert_eq!(estimate(0, 10), 10);
        assert_eq!(estimate(1, 10), 11);
        assert_eq!(estimate(8, 0), 2);
        assert_eq!(estimate(9, 0), 3);
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
