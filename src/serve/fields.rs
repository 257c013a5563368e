//! Reads the fields of a request body; shared by all routes.
//!
//! Unknown fields are ignored, because clients send many. A field of a wrong type or with a value out
//! of range is rejected with an error that names the field.

use std::fmt::Display;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ErrorResponse;
use crate::model::sampling::SamplingParams;

/// Maximum of `n`.
const MAX_CHOICES: usize = 16;
/// Maximum number of strings in `stop`.
const MAX_STOP_STRINGS: usize = 4;
/// Maximum number of most likely tokens in a response, per position.
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
    ///
    /// # Errors
    /// 400 if the value has a wrong type.
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
    ///
    /// # Errors
    /// 400 if it is absent or null, or has a wrong type.
    pub(crate) fn require<T: DeserializeOwned>(
        &self,
        name: &'static str,
    ) -> Result<T, ErrorResponse> {
        self.get(name)?
            .ok_or_else(|| ErrorResponse::bad_field(name, format!("`{name}` is missing")))
    }

    /// Returns the value of a field, or `None` if it is absent or null.
    ///
    /// # Errors
    /// 400 if the value has a wrong type, or is not from `min` to `max`.
    pub(crate) fn in_range<T>(
        &self,
        name: &'static str,
        min: T,
        max: T,
    ) -> Result<Option<T>, ErrorResponse>
    where
        T: DeserializeOwned + PartialOrd + Display,
    {
        let is_valid = |value: &T| (&min..=&max).contains(&value);
        self.get_checked(name, is_valid, format_args!("from {min} to {max}"))
    }

    /// Returns the value of a field, or `None` if it is absent or null.
    ///
    /// # Errors
    /// 400 if the value has a wrong type, or is less than `min`.
    pub(crate) fn at_least(
        &self,
        name: &'static str,
        min: usize,
    ) -> Result<Option<usize>, ErrorResponse> {
        self.get_checked(
            name,
            |&value| value >= min,
            format_args!("{min} or greater"),
        )
    }

    /// Returns the value of a field, or `None` if it is absent or null.
    ///
    /// # Errors
    /// 400 if `is_valid` returns false for the value; the message says that it must be `expected`.
    fn get_checked<T: DeserializeOwned + Display>(
        &self,
        name: &'static str,
        is_valid: impl Fn(&T) -> bool,
        expected: impl Display,
    ) -> Result<Option<T>, ErrorResponse> {
        match self.get(name)? {
            Some(value) if !is_valid(&value) => {
                let message = format!("`{name}` is {value}; it must be {expected}");
                Err(ErrorResponse::bad_field(name, message))
            }
            value => Ok(value),
        }
    }

    /// Returns the number of answers to each prompt.
    pub(crate) fn n(&self) -> Result<usize, ErrorResponse> {
        Ok(self.in_range("n", 1, MAX_CHOICES)?.unwrap_or(1))
    }

    /// Returns the sampling parameters. The default seed is random.
    pub(crate) fn sampling(&self) -> Result<SamplingParams, ErrorResponse> {
        let seed: Option<i64> = self.get("seed")?;
        Ok(SamplingParams {
            temperature: self.in_range("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            top_p: self.in_range("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            seed: seed.map_or_else(|| fastrand::u64(..), i64::cast_unsigned),
        })
    }

    /// Returns the stop strings, from a string or a list.
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

    /// Returns vLLM's `prompt_logprobs`: the number of most likely tokens to report at each prompt position.
    pub(crate) fn prompt_logprobs(&self) -> Result<Option<usize>, ErrorResponse> {
        self.in_range("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum StopField {
    One(String),
    Several(Vec<String>),
}
