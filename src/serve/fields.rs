//! The fields of a request body that every route reads alike.
//!
//! Fields that are not known here are ignored, as clients send many; a field of the wrong type or
//! out of range is refused with its name.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::model::sampling::SamplingParams;

const MAX_CHOICES: usize = 16;
const MAX_STOP_STRINGS: usize = 4;
pub(crate) const MAX_TOP_LOGPROBS: usize = 20;

/// A JSON object that names the field in its errors.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Of a request body.
    ///
    /// # Errors
    /// 400 where it is no JSON object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let body = serde_json::from_slice(body);
        body.map(Self)
            .map_err(|error| ApiError::bad_request(format!("the body is no JSON object: {error}")))
    }

    /// A field's value; none where it is absent or null.
    pub(crate) fn get<T: DeserializeOwned>(
        &self,
        name: &'static str,
    ) -> Result<Option<T>, ApiError> {
        self.0
            .get(name)
            .map(Option::<T>::deserialize)
            .transpose()
            .map(Option::flatten)
            .map_err(|error| ApiError::bad_field(name, format!("`{name}`: {error}")))
    }

    pub(crate) fn require<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, ApiError> {
        self.get(name)?
            .ok_or_else(|| ApiError::bad_field(name, format!("`{name}` is missing")))
    }

    pub(crate) fn within<T>(
        &self,
        name: &'static str,
        low: T,
        high: T,
    ) -> Result<Option<T>, ApiError>
    where
        T: DeserializeOwned + PartialOrd + std::fmt::Display,
    {
        match self.get(name)? {
            Some(value) if value < low || value > high => {
                let message = format!("`{name}` is {value}; it must be from {low} to {high}");
                Err(ApiError::bad_field(name, message))
            }
            value => Ok(value),
        }
    }

    /// Answers to each prompt.
    pub(crate) fn n(&self) -> Result<usize, ApiError> {
        Ok(self.within("n", 1, MAX_CHOICES)?.unwrap_or(1))
    }

    pub(crate) fn sampling(&self) -> Result<SamplingParams, ApiError> {
        let seed: Option<i64> = self.get("seed")?;
        Ok(SamplingParams {
            temperature: self.within("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            top_p: self.within("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            seed: seed.map_or_else(|| fastrand::u64(..), i64::cast_unsigned),
        })
    }

    pub(crate) fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = match self.get("stop")? {
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stop)) => stop,
            None => Vec::new(),
        };
        if stop.len() > MAX_STOP_STRINGS {
            let message = format!("`stop` holds at most {MAX_STOP_STRINGS} strings");
            return Err(ApiError::bad_field("stop", message));
        }
        Ok(stop)
    }

    /// vLLM's: how many of the likeliest tokens to tell at each position of the prompt.
    pub(crate) fn prompt_logprobs(&self) -> Result<Option<usize>, ApiError> {
        self.within("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}
