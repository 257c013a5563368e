//! Classifies answers by the sampling parameters of their requests.

use serde_json::Value;

/// Relation between the distribution that an answer was sampled from and its logprobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SamplingKind {
    /// The same distribution: at temperature 1, with nothing truncated, penalised or forced.
    Exact,
    /// A sharper distribution: at a lower temperature, or with unlikely tokens truncated.
    Sharper,
    /// Unknown: no temperature or one above 1, penalties, or parameters that exclude tokens or change their
    /// probabilities.
    Unknown,
}

impl SamplingKind {
    /// Classifies an answer to a request with these parameters.
    ///
    /// If the request has no temperature, the server chooses an unknown one.
    pub fn from_params(params: &Value) -> Self {
        let is_neutral = |name: &str, neutral_values: &[f64]| match params.get(name) {
            None | Some(Value::Null) => true,
            Some(value) => value
                .as_f64()
                .is_some_and(|value| neutral_values.contains(&value)),
        };
        let is_absent = |name: &&str| match params.get(name) {
            None | Some(Value::Null) => true,
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(Value::Array(values)) => values.is_empty(),
            Some(_) => false,
        };
        let Some(temperature) = params.get("temperature").and_then(Value::as_f64) else {
            return Self::Unknown;
        };
        let is_penalised = !(is_neutral("frequency_penalty", &[0.0])
            && is_neutral("presence_penalty", &[0.0])
            && is_neutral("repetition_penalty", &[1.0]));
        if temperature > 1.0 || is_penalised || !CONSTRAINTS.iter().all(is_absent) {
            return Self::Unknown;
        }
        let is_truncated = !(is_neutral("top_p", &[1.0])
            && is_neutral("top_k", &[0.0, -1.0])
            && is_neutral("min_p", &[0.0])
            && is_neutral("top_a", &[0.0])
            && is_neutral("typical_p", &[1.0]));
        if temperature == 1.0 && !is_truncated {
            Self::Exact
        } else {
            Self::Sharper
        }
    }
}

/// Parameters that exclude tokens or change their probabilities.
const CONSTRAINTS: [&str; 14] = [
    "logit_bias",
    "response_format",
    "tools",
    "functions",
    "grammar",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "bad_words",
    "allowed_token_ids",
    "min_tokens",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_plain_sampling_at_temperature_1_is_exact() {
        for params in [
            json!({"temperature": 1}),
            json!({"temperature": 1.0, "top_p": 1, "top_k": -1, "logit_bias": {}, "n": 2}),
            json!({"temperature": 1.0, "frequency_penalty": 0, "min_p": null, "seed": 7}),
        ] {
            assert_eq!(
                SamplingKind::from_params(&params),
                SamplingKind::Exact,
                "{params}"
            );
        }
        for params in [
            json!({"temperature": 0.7}),
            json!({"temperature": 0}),
            json!({"temperature": 1, "top_p": 0.95}),
            json!({"temperature": 1, "top_k": 50}),
        ] {
            assert_eq!(
                SamplingKind::from_params(&params),
                SamplingKind::Sharper,
                "{params}"
            );
        }
        for params in [
            json!({}),
            json!(null),
            json!({"temperature": null}),
            json!({"temperature": 1.5}),
            json!({"temperature": 1, "repetition_penalty": 1.1}),
            json!({"temperature": 0, "logit_bias": {"7": -100}}),
            json!({"temperature": 1, "response_format": {"type": "json_object"}}),
        ] {
            assert_eq!(
                SamplingKind::from_params(&params),
                SamplingKind::Unknown,
                "{params}"
            );
        }
    }
}
