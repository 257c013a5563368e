//! Assignment of each prompt to one endpoint, for `prompts.teachers = "share"`. Pure.

/// Assigns a prompt to an endpoint by a hash of the prompt's id: each endpoint receives a part of the prompts in
/// proportion to its share. Returns the index of the endpoint.
pub(crate) fn endpoint_of(prompt_id: &str, shares: &[f64]) -> usize {
    let hash = blake3::hash(prompt_id.as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    let total: f64 = shares.iter().sum();
    let mut point = u64::from_le_bytes(bytes) as f64 / u64::MAX as f64 * total;
    for (endpoint, share) in shares.iter().enumerate() {
        point -= share;
        if point < 0.0 {
            return endpoint;
        }
    }
    shares.len().saturating_sub(1)
}
