//! [`RequestCost`]: the amount of each rate-limited resource that a request uses.

use crate::rate_limit::headers::Resource;

/// Tokens of a request: estimated before it is sent, or reported with its answer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RequestCost {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl RequestCost {
    pub fn tokens(&self) -> u64 {
        self.input_tokens + self.output_tokens
    }

    /// Returns the amount of a resource that the request uses.
    pub fn get(&self, resource: Resource) -> f64 {
        let amount = match resource {
            Resource::Requests => 1,
            Resource::Tokens => self.tokens(),
            Resource::InputTokens => self.input_tokens,
            Resource::OutputTokens => self.output_tokens,
        };
        amount as f64
    }
}
