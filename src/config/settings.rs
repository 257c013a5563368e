//! The whole config, and values derived from several sections. `config.example.toml` documents every setting.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::data::*;
use super::harvest::*;
use super::student::*;
use super::teacher::*;

/// All settings, one field per section of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Path of the config file.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Values of the `--set` flags.
    #[serde(skip)]
    pub flags: Vec<String>,
    /// Folder of this run, for the cache, checkpoints, metrics and the student.
    pub run_dir: PathBuf,
    pub teacher: TeacherConfig,
    /// Several teachers; keys that an entry omits have the values of `[teacher]`.
    pub teachers: Vec<TeacherConfig>,
    pub prompts: PromptsConfig,
    pub sampling: SamplingConfig,
    pub harvest: HarvestConfig,
    pub limits: LimitsConfig,
    pub retry: RetryConfig,
    pub price: Price,
    pub budget: BudgetConfig,
    pub schedule: ScheduleConfig,
    pub batch: BatchConfig,
    pub cache: CacheConfig,
    pub student: StudentConfig,
    pub data: DataConfig,
    pub loss: LossConfig,
    pub lora: LoraConfig,
    pub train: TrainConfig,
    pub on_policy: OnPolicyConfig,
    pub eval: EvalConfig,
}

impl Config {
    /// Command-line flags that select this config, quoted for a shell; empty if the config has no file.
    pub fn arguments(&self) -> String {
        let Some(file) = &self.file else {
            return String::new();
        };
        let mut words = vec!["-c".to_owned(), file.display().to_string()];
        for flag in &self.flags {
            words.extend(["--set".to_owned(), flag.clone()]);
        }
        let words = words.iter().map(String::as_str);
        // Text with a NUL cannot be an argument.
        shlex::try_join(words).unwrap_or_default()
    }

    /// Settings of each endpoint: those of `[[teachers]]`, or of `[teacher]` without a list.
    pub fn endpoints(&self) -> Vec<EndpointConfig> {
        let teachers = if self.teachers.is_empty() {
            std::slice::from_ref(&self.teacher)
        } else {
            &self.teachers
        };
        let endpoint = |teacher: &TeacherConfig| EndpointConfig {
            teacher: teacher.clone(),
            sampling: teacher.sampling.as_ref().unwrap_or(&self.sampling).clone(),
            limits: teacher.limits.as_ref().unwrap_or(&self.limits).clone(),
            price: teacher.price.as_ref().unwrap_or(&self.price).clone(),
        };
        teachers.iter().map(endpoint).collect()
    }

    /// The same settings with the prices of batches.
    pub fn at_batch_prices(&self) -> Config {
        let mut config = self.clone();
        let discount = self.batch.discount;
        config.price = self.price.at(discount);
        for teacher in config.teachers.iter_mut().chain([&mut config.teacher]) {
            teacher.price = teacher.price.as_ref().map(|price| price.at(discount));
        }
        config
    }

    /// The same settings with the concurrency of the endpoints scaled down to a total of about `max_in_flight`.
    pub fn with_at_most_in_flight(&self, max_in_flight: usize) -> Config {
        let total: usize = self
            .endpoints()
            .iter()
            .map(|endpoint| endpoint.limits.concurrency)
            .sum();
        let scale = |limits: &mut LimitsConfig| {
            limits.concurrency = (limits.concurrency * max_in_flight / total.max(1)).max(1);
        };
        let mut config = self.clone();
        scale(&mut config.limits);
        for teacher in config.teachers.iter_mut().chain([&mut config.teacher]) {
            teacher.limits.iter_mut().for_each(scale);
        }
        config
    }

    /// Cache folder of this run, which `harvest` writes.
    pub fn own_cache(&self) -> PathBuf {
        self.run_dir.join("cache")
    }

    /// Run folder, within `run_dir`, for an endpoint's scores of the student's own answers.
    pub fn judged_dir(&self) -> PathBuf {
        self.run_dir.join("judged")
    }

    /// Cache folder that `train` and `eval` read.
    pub fn training_cache(&self) -> PathBuf {
        self.data.cache.clone().unwrap_or_else(|| self.own_cache())
    }

    /// Model folder that `train` writes the student to.
    pub fn student_dir(&self) -> PathBuf {
        self.run_dir.join("student")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            file: None,
            flags: Vec::new(),
            run_dir: "run".into(),
            teacher: TeacherConfig::default(),
            teachers: Vec::new(),
            prompts: PromptsConfig::default(),
            sampling: SamplingConfig::default(),
            harvest: HarvestConfig::default(),
            limits: LimitsConfig::default(),
            retry: RetryConfig::default(),
            price: Price::default(),
            budget: BudgetConfig::default(),
            schedule: ScheduleConfig::default(),
            batch: BatchConfig::default(),
            cache: CacheConfig::default(),
            student: StudentConfig::default(),
            data: DataConfig::default(),
            loss: LossConfig::default(),
            lora: LoraConfig::default(),
            train: TrainConfig::default(),
            on_policy: OnPolicyConfig::default(),
            eval: EvalConfig::default(),
        }
    }
}
