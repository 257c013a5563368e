//! A tokenised conversation with what it teaches.

/// Soft labels of one position: the teacher's top-k, mapped to student token ids.
///
/// `logprobs` are natural logarithms, best first; missing ones (sentinels) have been dropped and
/// several tokens that map to one id merged. The mass that is not listed is the tail.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SoftLabels {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
}

/// One supervised position.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Index of the hidden state that predicts: `label` is `input_ids[position + 1]`.
    pub position: usize,
    /// The token to predict (the hard label).
    pub label: u32,
    /// None where the teacher gave nothing usable; the position then trains on cross-entropy.
    pub soft: Option<SoftLabels>,
}

/// A conversation of T tokens of which some are supervised: the answer and its end-of-turn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The cache key, or the row's number in a messages file: names the example in errors.
    pub key: String,
    pub prompt_id: String,
    pub input_ids: Vec<u32>,
    /// In the order of their positions.
    pub targets: Vec<Target>,
}
