//! Metrics of steps and evaluations, and the file `metrics.jsonl`.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::fs::LogFile;
use crate::train::loss::position::PositionLoss;

/// Sums of metrics over supervised positions. See [`MetricMeans`] for the metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct MetricSums {
    /// Number of positions.
    pub positions: u64,
    pub ce: f64,
    /// Number of positions whose most likely token is the label.
    pub label_hits: u64,
    /// Number of positions with soft labels.
    pub soft_positions: u64,
    /// Loss term of the soft labels.
    pub kd: f64,
    pub kl: f64,
    /// Number of positions whose most likely token is the teacher's.
    pub teacher_hits: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// Loss term of the chunks.
    pub alm: f64,
    calibration: [CalibrationBin; BINS],
}

/// Number of confidence bins (Guo et al., arXiv 1706.04599).
const BINS: usize = 15;

/// Positions whose most likely token has a probability in this bin.
#[derive(Debug, Clone, Copy, Default)]
struct CalibrationBin {
    /// Sum of these probabilities.
    confidence: f64,
    /// Number of positions whose most likely token is the label.
    hits: u64,
}

impl MetricSums {
    /// Adds the positions of a micro-batch, in order.
    pub fn add(&mut self, rows: &[PositionLoss]) {
        for row in rows {
            self.positions += 1;
            self.ce += f64::from(row.ce);
            self.label_hits += u64::from(row.top1_is_label);
            let confidence = f64::from(row.confidence);
            let bin_index = (confidence * BINS as f64) as usize;
            let bin = &mut self.calibration[bin_index.min(BINS - 1)];
            bin.confidence += confidence;
            bin.hits += u64::from(row.top1_is_label);
            self.chunks += u64::from(row.alm.is_some());
            self.alm += f64::from(row.alm.unwrap_or_default());
            if let (Some(kd), Some(kl), Some(is_hit)) = (row.kd, row.kl, row.top1_is_teachers) {
                self.soft_positions += 1;
                self.kd += f64::from(kd);
                self.kl += f64::from(kl);
                self.teacher_hits += u64::from(is_hit);
            }
        }
    }

    /// Returns the means of the metrics.
    pub fn means(&self) -> MetricMeans {
        let error = |bin: &CalibrationBin| (bin.confidence - bin.hits as f64).abs();
        let calibration_error: f64 = self.calibration.iter().map(error).sum();
        let mean = |sum: f64, count: u64| (count > 0).then(|| sum / count as f64);
        MetricMeans {
            positions: self.positions,
            soft_positions: self.soft_positions,
            ce: mean(self.ce, self.positions),
            perplexity: mean(self.ce, self.positions).map(f64::exp),
            token_accuracy: mean(self.label_hits as f64, self.positions),
            kd: mean(self.kd, self.soft_positions),
            calibration_error: mean(calibration_error, self.positions),
            kl: mean(self.kl, self.soft_positions),
            alm: mean(self.alm, self.chunks),
            teacher_agreement: mean(self.teacher_hits as f64, self.soft_positions),
        }
    }
}

/// Means of metrics over supervised positions; None for a mean over no positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricMeans {
    pub positions: u64,
    pub soft_positions: u64,
    /// Cross-entropy with the answers' tokens, in nats.
    pub ce: Option<f64>,
    /// e^ce.
    pub perplexity: Option<f64>,
    /// Share of positions whose most likely token is the label.
    pub token_accuracy: Option<f64>,
    /// Loss term of the soft labels: the selected divergence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kd: Option<f64>,
    /// Expected calibration error: absolute difference between mean confidence and accuracy of a confidence bin,
    /// averaged over the bins, weighted by their numbers of positions.
    pub calibration_error: Option<f64>,
    /// KL divergence to the teacher, in nats: on its top-k and the tail, or over the whole vocabulary with a local
    /// teacher.
    pub kl: Option<f64>,
    /// Mean loss term of the chunks, in nats (see `loss::chunk`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alm: Option<f64>,
    /// Share of positions whose most likely token is the teacher's.
    pub teacher_agreement: Option<f64>,
}

/// `metrics.jsonl`: one line per step and per validation.
pub(crate) struct MetricsLog(LogFile);

impl MetricsLog {
    /// Opens the file and removes the lines of the steps after `step`, because these steps will be repeated.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self> {
        let is_kept = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            line["step"]
                .as_u64()
                .is_some_and(|line_step| line_step <= step)
        };
        Ok(Self(LogFile::open(path, is_kept)?))
    }

    /// Writes the line of an optimizer step.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn step(&mut self, line: &StepMetrics) -> Result<()> {
        self.0.write(&serde_json::to_string(line)?)
    }

    /// Writes the line of the validation after `step`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn validation(&mut self, step: u64, means: &MetricMeans) -> Result<()> {
        let line = json!({ "step": step, "split": "validation", "means": means });
        self.0.write(&line.to_string())
    }
}

/// Line of `metrics.jsonl` for a training step.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StepMetrics {
    pub step: u64,
    pub split: &'static str,
    pub epoch: u64,
    /// Minimised loss; `None` if the step had no supervised positions.
    pub loss: Option<f64>,
    pub ce: Option<f64>,
    pub kl: Option<f64>,
    /// Terms of soft labels and chunks, see [`MetricMeans`].
    pub kd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alm: Option<f64>,
    /// Divergence on answers that the student generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_policy_kd: Option<f64>,
    /// Cross-entropy of a co-trained teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_ce: Option<f64>,
    pub learning_rate: f64,
    pub grad_norm: Option<f64>,
    /// Number of tokens since the start of the run, over all sessions.
    pub tokens: u64,
    /// Speed of this step; the only value that differs between equal runs.
    pub tokens_per_s: f64,
}
