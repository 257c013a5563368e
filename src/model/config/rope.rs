//! Settings and frequencies of the rotary embedding.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::fields::config_error;

/// Settings of the rotary embedding.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// The scaling of Llama 3; None if the frequencies are not scaled.
    pub llama3: Option<Llama3Scaling>,
}

/// Scaling of `rope_type = "llama3"`: frequencies with long wavelengths are divided by `factor`, frequencies
/// with short wavelengths are kept, and frequencies between them are interpolated.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl Rope {
    /// Parses the settings of `config.json`. transformers 5 writes `rope_parameters`, which includes theta;
    /// earlier versions write `rope_theta` and `rope_scaling`.
    ///
    /// # Errors
    /// Where the type of scaling is not supported, or a value is out of its range.
    pub(super) fn from_json(json: &Map<String, Value>) -> Result<Self> {
        // transformers 5 also prefers `rope_scaling` to `rope_parameters`, if it is not empty.
        let settings = |name: &str| {
            let map = json.get(name).and_then(Value::as_object);
            map.filter(|map| !map.is_empty())
        };
        let scaling = settings("rope_scaling").or(settings("rope_parameters"));
        let mut values = scaling.into_iter().flat_map(|map| map.values());
        if values.any(Value::is_object) {
            return config_error("rope settings per layer type are not supported".into());
        }
        let field = |name: &str| scaling.and_then(|map| map.get(name));
        let candidates = [field("rope_theta"), json.get("rope_theta")];
        let mut thetas = candidates
            .into_iter()
            .flatten()
            .filter(|value| !value.is_null());
        let theta = match thetas.next() {
            // The default of transformers.
            None => 10_000.0,
            Some(value) => match value.as_f64() {
                Some(theta) => theta,
                None => return config_error(format!("rope_theta is {value}; expected a number")),
            },
        };
        if let Some(other) = thetas.next().filter(|other| other.as_f64() != Some(theta)) {
            tracing::warn!(
                "config.json has two values of rope_theta: using {theta}, like transformers 5; transformers 4 would \
                 use {other}"
            );
        }
        if !theta.is_finite() || theta <= 0.0 {
            return config_error(format!(
                "rope_theta is {theta}; expected a finite number above 0"
            ));
        }
        let kind = field("rope_type").or(field("type")).and_then(Value::as_str);
        let llama3 = match kind {
            None | Some("default") => None,
            Some("llama3") => {
                let map = Value::Object(scaling.cloned().unwrap_or_default());
                let scaling: Llama3Scaling =
                    serde_json::from_value(map).context("invalid rope scaling of type llama3")?;
                scaling.check()?;
                Some(scaling)
            }
            Some(other) => {
                return config_error(format!("rope scaling of type {other:?} is not supported"));
            }
        };
        Ok(Self { theta, llama3 })
    }

    /// Writes the settings to `json` in two forms: `rope_theta` and `rope_scaling` for transformers 4, and
    /// `rope_parameters` for transformers 5. Returns true if this changed `json`.
    pub(super) fn write(&self, json: &mut Map<String, Value>) -> bool {
        let before = json.clone();
        let read = |name: &str| {
            let map = json.get(name).and_then(Value::as_object);
            map.filter(|map| !map.is_empty()).cloned()
        };
        let mut settings = read("rope_scaling").or_else(|| read("rope_parameters"));
        let settings = settings.get_or_insert_default();
        let old_kind = settings.remove("type");
        let kind = settings.entry("rope_type");
        let kind = kind.or_insert(old_kind.unwrap_or_else(|| "default".into()));
        let is_scaled = *kind != "default";
        settings.remove("rope_theta");
        let scaling = if is_scaled {
            Value::Object(settings.clone())
        } else {
            Value::Null
        };
        settings.insert("rope_theta".into(), self.theta.into());
        json.insert("rope_parameters".into(), Value::Object(settings.clone()));
        json.insert("rope_scaling".into(), scaling);
        json.insert("rope_theta".into(), self.theta.into());
        *json != before
    }

    /// Returns the frequency of each of the `channels` / 2 channel pairs: the angle per position, in radians.
    pub fn inverse_frequencies(&self, channels: usize) -> Vec<f32> {
        (0..channels / 2)
            .map(|pair| {
                let frequency = self.theta.powf(-((2 * pair) as f64) / channels as f64);
                self.llama3.map_or(frequency, |s| s.scale(frequency)) as f32
            })
            .collect()
    }
}

impl Llama3Scaling {
    /// Checks the ranges of the values, outside which frequencies would be infinite, negative or NaN.
    fn check(&self) -> Result<()> {
        for (name, value) in [
            ("factor", self.factor),
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
            (
                "original_max_position_embeddings",
                self.original_max_position_embeddings,
            ),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return config_error(format!(
                    "{name} of the rope scaling is {value}; expected a finite number above 0"
                ));
            }
        }
        if self.low_freq_factor >= self.high_freq_factor {
            return config_error(format!(
                "low_freq_factor of the rope scaling is {}; expected less than high_freq_factor, which is {}",
                self.low_freq_factor, self.high_freq_factor
            ));
        }
        Ok(())
    }

    /// Returns the scaled frequency. Frequencies are in radians per position.
    fn scale(&self, frequency: f64) -> f64 {
        let context = self.original_max_position_embeddings;
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < context / self.high_freq_factor {
            return frequency;
        }
        if wavelength > context / self.low_freq_factor {
            return frequency / self.factor;
        }
        let smooth = (context / wavelength - self.low_freq_factor)
            / (self.high_freq_factor - self.low_freq_factor);
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}
