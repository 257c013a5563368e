//! [`Usage`]: token counts of answers.

use serde::{Deserialize, Serialize};

/// Token counts as billed by the endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Prompt tokens that the provider's prompt cache served; included in `prompt_tokens`.
    pub cached_tokens: u64,
    /// Tokens of hidden reasoning; included in `completion_tokens`.
    pub reasoning_tokens: u64,
}

impl Usage {
    /// Adds the counts of `other`, saturating.
    pub fn add(&mut self, other: &Usage) {
        let sums = [
            (&mut self.prompt_tokens, other.prompt_tokens),
            (&mut self.completion_tokens, other.completion_tokens),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.reasoning_tokens, other.reasoning_tokens),
        ];
        for (sum, count) in sums {
            *sum = sum.saturating_add(count);
        }
    }
}
