//! Reads the fields of a request body; shared by all routes.
//!
//! Unknown fields are ignored, since clients send many. A field with a wrong type or a value out of
//! range is rejected with an error that names it.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ErrorResponse;
use crate::model::sampling::SamplingParams;

const MAX_CHOICES: usize = 16;
const MAX_STOP_STRINGS: usize = 4;
pub(crate) const MAX_TOP_LOGPROBS: usize = 20;

/// The fields of a JSON object. Errors name the field.
pub(crate) struct RequestFields(Map<String, Value>);

impl RequestFields {
    /// Parses a request body.
    ///
    /// # Errors
    /// 400 if it is not a JSON object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ErrorResponse> {
        let body = serde_json::from_slice(body);
        body.map(Self).map_err(|error| {
            ErrorResponse::bad_request(format!("the body is not a valid JSON object: {error}"))
        })
    }

    /// Returns the value of a field, or `None` if it is absent or null.
    pub(crate) fn get<T: DeserializeOwned>(
        &self,
        name: &'static str,
    ) -> Result<Option<T>, ErrorResponse> {
        self.0
            .get(name)
            .map(Option::<T>::deserialize)
            .transpose()
            .map(Option::flatten)
            .map_err(|error| ErrorResponse::bad_field(name, format!("`{name}`: {error}")))
    }

    /// Returns the value of a required field.
    pub(crate) fn require<T: DeserializeOwned>(
        &self,
        name: &'static str,
    ) -> Result<T, ErrorResponse> {
        self.get(name)?
            .ok_or_else(|| ErrorResponse::bad_field(name, format!("`{name}` is missing")))
    }

    /// Returns the value of a field and checks that it is from `low` to `high`.
    pub(crate) fn within<T>(
        &self,
        name: &'static str,
        low: T,
        high: T,
    ) -> Result<Option<T>, ErrorResponse>
    where
        T: DeserializeOwned + PartialOrd + std::fmt::Display,
    {
        match self.get(name)? {
            Some(value) if value < low || value > high => {
                let message = format!("`{name}` is {value}; it must be from {low} to {high}");
                Err(ErrorResponse::bad_field(name, message))
            }
            value => Ok(value),
        }
    }

    /// Number of answers to each prompt.
    pub(crate) fn n(&self) -> Result<usize, ErrorResponse> {
        Ok(self.within("n", 1, MAX_CHOICES)?.unwrap_or(1))
    }

    pub(crate) fn sampling(&self) -> Result<SamplingParams, ErrorResponse> {
        let seed: Option<i64> = self.get("seed")?;
        Ok(SamplingParams {
            temperature: self.within("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            top_p: self.within("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            seed: seed.map_or_else(|| fastrand::u64(..), i64::cast_unsigned),
        })
    }

    pub(crate) fn stop(&self) -> Result<Vec<String>, ErrorResponse> {
        let stop = match self.get("stop")? {
            Some(StopField::One(stop)) => vec![stop],
            Some(StopField::Several(stop)) => stop,
            None => Vec::new(),
        };
        if stop.len() > MAX_STOP_STRINGS {
            let message = format!("`stop` must contain at most {MAX_STOP_STRINGS} strings");
            return Err(ErrorResponse::bad_field("stop", message));
        }
        Ok(stop)
    }

    /// vLLM's `prompt_logprobs`: number of most likely tokens to return at each prompt position.
    pub(crate) fn prompt_logprobs(&self) -> Result<Option<usize>, ErrorResponse> {
        self.within("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum StopField {
    One(String),
    Several(Vec<String>),
}
