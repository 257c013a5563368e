//! What a step and an evaluation report, and `metrics.jsonl`, which keeps it.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::fs::LogFile;
use crate::train::loss::row::RowLoss;

/// Sums over supervised positions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sums {
    pub positions: u64,
    pub ce: f64,
    pub label_hits: u64,
    /// Positions with soft labels.
    pub soft_positions: u64,
    /// What soft labels add to the loss.
    pub kd: f64,
    pub kl: f64,
    pub teacher_hits: u64,
    pub chunks: u64,
    pub alm: f64,
    calibration: [Bin; BINS],
}

/// Ranges of confidence, as is the custom (Guo et al., arXiv 1706.04599).
const BINS: usize = 15;

/// Positions whose most likely token has a probability in one of them.
#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    confidence: f64,
    hits: u64,
}

impl Sums {
    /// Adds the positions of a micro-batch, in order.
    pub fn add(&mut self, rows: &[RowLoss]) {
        for row in rows {
            self.positions += 1;
            self.ce += f64::from(row.ce);
            self.label_hits += u64::from(row.top1_is_label);
            let confidence = f64::from(row.confidence);
            let bin = (confidence * BINS as f64) as usize;
            let bin = &mut self.calibration[bin.min(BINS - 1)];
            bin.confidence += confidence;
            bin.hits += u64::from(row.top1_is_label);
            self.chunks += u64::from(row.alm.is_some());
            self.alm += f64::from(row.alm.unwrap_or_default());
            if let (Some(kd), Some(kl), Some(hit)) = (row.kd, row.kl, row.top1_is_teachers) {
                self.soft_positions += 1;
                self.kd += f64::from(kd);
                self.kl += f64::from(kl);
                self.teacher_hits += u64::from(hit);
            }
        }
    }

    pub fn means(&self) -> Means {
        let off = |bin: &Bin| (bin.confidence - bin.hits as f64).abs();
        let off: f64 = self.calibration.iter().map(off).sum();
        let mean = |sum: f64, count: u64| (count > 0).then(|| sum / count as f64);
        Means {
            positions: self.positions,
            soft_positions: self.soft_positions,
            ce: mean(self.ce, self.positions),
            perplexity: mean(self.ce, self.positions).map(f64::exp),
            token_accuracy: mean(self.label_hits as f64, self.positions),
            kd: mean(self.kd, self.soft_positions),
            calibration_error: mean(off, self.positions),
            kl: mean(self.kl, self.soft_positions),
            alm: mean(self.alm, self.chunks),
            teacher_agreement: mean(self.teacher_hits as f64, self.soft_positions),
        }
    }
}

/// Means over supervised positions; None where there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Means {
    pub positions: u64,
    pub soft_positions: u64,
    /// Cross-entropy of the answers' tokens, in nats.
    pub ce: Option<f64>,
    /// e^ce.
    pub perplexity: Option<f64>,
    /// Share of positions whose most likely token is the answer's.
    pub token_accuracy: Option<f64>,
    /// What soft labels add to the loss: the divergence that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kd: Option<f64>,
    /// Expected calibration error: by how much the probability of the most likely token differs from how
    /// often it is the answer's, in the mean over ranges of that probability.
    pub calibration_error: Option<f64>,
    /// KL divergence to the teacher, in nats: on its top-k and the tail, or in full where it is on this
    /// machine.
    pub kl: Option<f64>,
    /// Mean over the chunks that several tokens of the teacher spell: how far their likelihoods are
    /// apart, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alm: Option<f64>,
    /// Share of positions whose most likely token is the teacher's.
    pub teacher_agreement: Option<f64>,
}

/// `metrics.jsonl`: a line a step and a line a validation.
pub(crate) struct Metrics(LogFile);

impl Metrics {
    /// Opens the file and drops what was written after step `step`, which will be done again.
    ///
    /// # Errors
    /// Where the file cannot be opened.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self> {
        let kept = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            line["step"].as_u64().is_some_and(|s| s <= step)
        };
        Ok(Self(LogFile::open(path, kept)?))
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(crate) fn step(&mut self, line: &StepLine) -> Result<()> {
        self.0.write(&serde_json::to_string(line)?)
    }

    /// The validation part after `step`.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(crate) fn validation(&mut self, step: u64, means: &Means) -> Result<()> {
        let line = json!({ "step": step, "split": "validation", "means": means });
        self.0.write(&line.to_string())
    }
}

/// A training step as `metrics.jsonl` keeps it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StepLine {
    pub step: u64,
    pub split: &'static str,
    pub epoch: u64,
    /// What was minimised.
    pub loss: f64,
    pub ce: Option<f64>,
    pub kl: Option<f64>,
    /// What soft labels and chunks add, see [`Means`].
    pub kd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alm: Option<f64>,
    /// The divergence on what the student wrote itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_policy_kd: Option<f64>,
    /// Of a teacher that is trained along.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_ce: Option<f64>,
    pub learning_rate: f64,
    pub grad_norm: f64,
    /// Tokens trained on since the start of the run, over all its sessions.
    pub tokens: u64,
    /// Speed of this step; the one value that differs between equal runs.
    pub tokens_per_s: f64,
}
