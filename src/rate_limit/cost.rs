//! TODO

use crate::rate_limit::headers::Resource;

/// How much of each resource a request uses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RequestCost {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl RequestCost {
    pub fn tokens(&self) -> u64 {
        self.input_tokens + self.output_tokens
    }

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
