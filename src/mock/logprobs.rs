//! Writes logprobs of a valid distribution: the probabilities of the alternatives sum to at most one.
//!
//! The probability p of the chosen token is one of a few levels. The other tokens have the probabilities (1 - p) / 2,
//! (1 - p) / 4, ... Their JSON is written once for each level, as a template from which answers are assembled.

/// Number of different probabilities p of a chosen token.
const PROBABILITY_LEVELS: usize = 16;

/// The logprobs of all probability levels as JSON.
#[derive(Debug)]
pub(crate) struct LogprobTemplates {
    templates: Vec<LogprobTemplate>,
}

/// The logprobs of one probability level.
#[derive(Debug)]
struct LogprobTemplate {
    /// Logprob of the chosen token.
    logprob: String,
    /// `,{"token":...}` for each rank after the first.
    alternatives: Vec<u8>,
    /// End offset of each alternative.
    alternative_ends: Vec<usize>,
}

impl LogprobTemplates {
    /// Creates templates for up to `max_alternatives` alternatives at a temperature. Temperature 1 does not change the
    /// probabilities.
    pub(crate) fn new(max_alternatives: usize, temperature: f64) -> LogprobTemplates {
        let templates = (0..PROBABILITY_LEVELS).map(|level| {
            // From 0.5 to 0.99.
            let p = 0.5 + 0.49 * level as f64 / (PROBABILITY_LEVELS - 1) as f64;
            LogprobTemplate::new(p, max_alternatives, temperature)
        });
        LogprobTemplates {
            templates: templates.collect(),
        }
    }

    /// Appends the logprobs of `token` with `top_logprobs` alternatives, of which the token itself is the first.
    pub(crate) fn write(
        &self,
        out: &mut Vec<u8>,
        token: &[u8],
        top_logprobs: usize,
        rng: &mut fastrand::Rng,
    ) {
        let template = &self.templates[rng.usize(..PROBABILITY_LEVELS)];
        out.push(b'{');
        let start = out.len();
        write_token(out, token, &template.logprob);
        let end = out.len();
        out.extend_from_slice(b",\"top_logprobs\":[");
        if top_logprobs > 0 {
            out.push(b'{');
            out.extend_from_within(start..end);
            out.push(b'}');
            let others = (top_logprobs - 1).min(template.alternative_ends.len());
            let end = others
                .checked_sub(1)
                .map_or(0, |last| template.alternative_ends[last]);
            out.extend_from_slice(&template.alternatives[..end]);
        }
        out.extend_from_slice(b"]}");
    }
}

impl LogprobTemplate {
    fn new(p: f64, max_alternatives: usize, temperature: f64) -> LogprobTemplate {
        // A temperature near 0 gives the most likely token almost all of the probability.
        let power = 1.0 / temperature.max(0.01);
        // Each probability q becomes q^power / sum of all q^power. The other tokens form a geometric series.
        let half = 0.5f64.powf(power);
        let chosen = p.powf(power);
        let others = (1.0 - p).powf(power);
        let log_sum = (chosen + others * half / (1.0 - half)).ln();
        let mut template = LogprobTemplate {
            logprob: format!("{:.6}", (power * p.ln() - log_sum).min(0.0)),
            alternatives: Vec::new(),
            alternative_ends: Vec::new(),
        };
        for rank in 1..max_alternatives {
            let logprob = power * ((1.0 - p).ln() - rank as f64 * 2f64.ln()) - log_sum;
            template.alternatives.extend_from_slice(b",{");
            write_token(
                &mut template.alternatives,
                format!(" alt{rank:02}").as_bytes(),
                &format!("{logprob:.6}"),
            );
            template.alternatives.push(b'}');
            template.alternative_ends.push(template.alternatives.len());
        }
        template
    }
}

/// Appends `"token":...,"logprob":...,"bytes":[...]`.
fn write_token(out: &mut Vec<u8>, token: &[u8], logprob: &str) {
    out.extend_from_slice(b"\"token\":");
    write_string(out, &String::from_utf8_lossy(token));
    out.extend_from_slice(b",\"logprob\":");
    out.extend_from_slice(logprob.as_bytes());
    out.extend_from_slice(b",\"bytes\":[");
    for (index, byte) in token.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_number(out, u64::from(*byte));
    }
    out.push(b']');
}

/// Appends a JSON string.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    // Writing to a `Vec` does not fail.
    let _ = serde_json::to_writer(out, text);
}

/// Appends a decimal number.
pub(crate) fn write_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn probabilities(temperature: f64, top: usize) -> Vec<f64> {
        let mut out = Vec::new();
        let templates = LogprobTemplates::new(20, temperature);
        templates.write(&mut out, b"x\"", top, &mut fastrand::Rng::with_seed(7));
        let position: Value = serde_json::from_slice(&out).unwrap();
        let top = position["top_logprobs"].as_array().unwrap();
        top.iter()
            .map(|token| token["logprob"].as_f64().unwrap().exp())
            .collect()
    }

    #[test]
    fn alternatives_sum_to_one_minus_the_tail() {
        for (top, tail) in [(1, 0.5), (5, 0.04), (20, 2e-6)] {
            let probabilities = probabilities(1.0, top);
            assert_eq!(probabilities.len(), top);
            let sum: f64 = probabilities.iter().sum();
            assert!(sum <= 1.0 + 1e-5 && sum > 1.0 - tail - 1e-5, "{top}: {sum}");
        }
        assert!(probabilities(1.0, 0).is_empty());
    }

    #[test]
    fn temperature_scales_the_distribution() {
        for temperature in [0.3, 0.7, 1.5] {
            let plain = probabilities(1.0, 20);
            let tempered = probabilities(temperature, 20);
            let sum: f64 = tempered.iter().sum();
            assert!((0.99..1.00001).contains(&sum), "{temperature}: {sum}");
            // Each probability is p_i^(1/T) times a factor that cancels in the ratio of two.
            let ratio = |p: &[f64]| (p[0] / p[3]).ln();
            let expected = ratio(&plain) / temperature;
            assert!((ratio(&tempered) - expected).abs() < 1e-4, "{temperature}");
        }
    }
}
