//! Every setting, its type and its default. `config.example.toml` documents them one by one, and a
//! test holds the two equal.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::data::*;
use super::harvest::*;
use super::student::*;
use super::teacher::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Path of the config file.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Values of the `--set` flags.
    #[serde(skip)]
    pub flags: Vec<String>,
    /// Folder of this run: the cache, checkpoints, metrics and the student land here.
    pub run_dir: PathBuf,
    pub teacher: TeacherConfig,
    /// Several teachers; what an entry leaves out is that of `[teacher]`.
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
    /// The flags that name this config on a command line, quoted for a shell; empty if it has no file.
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

    /// Every endpoint that is asked, with its own settings.
    pub fn endpoints(&self) -> Vec<EndpointConfig> {
        let teachers = match self.teachers.is_empty() {
            true => std::slice::from_ref(&self.teacher),
            false => &self.teachers,
        };
        let endpoint = |teacher: &TeacherConfig| EndpointConfig {
            teacher: teacher.clone(),
            sampling: teacher.sampling.as_ref().unwrap_or(&self.sampling).clone(),
            limits: teacher.limits.as_ref().unwrap_or(&self.limits).clone(),
            price: teacher.price.as_ref().unwrap_or(&self.price).clone(),
        };
        teachers.iter().map(endpoint).collect()
    }

    /// The same settings with the prices that hold in a batch.
    pub fn at_batch_prices(&self) -> Config {
        let mut config = self.clone();
        let discount = self.batch.discount;
        config.price = self.price.at(discount);
        for teacher in config.teachers.iter_mut().chain([&mut config.teacher]) {
            teacher.price = teacher.price.as_ref().map(|price| price.at(discount));
        }
        config
    }

    /// The same settings with no more requests in flight at once than `most`, by each endpoint's part.
    pub fn with_at_most_in_flight(&self, most: usize) -> Config {
        let wanted: usize = self
            .endpoints()
            .iter()
            .map(|endpoint| endpoint.limits.concurrency)
            .sum();
        let part = |limits: &mut LimitsConfig| {
            limits.concurrency = (limits.concurrency * most / wanted.max(1)).max(1);
        };
        let mut config = self.clone();
        part(&mut config.limits);
        for teacher in config.teachers.iter_mut().chain([&mut config.teacher]) {
            teacher.limits.iter_mut().for_each(part);
        }
        config
    }

    /// The folder of this run's cache, which `harvest` writes.
    pub fn own_cache(&self) -> PathBuf {
        self.run_dir.join("cache")
    }

    /// The folder of what an endpoint says of the student's own answers: a run folder within the run's.
    pub fn judged_dir(&self) -> PathBuf {
        self.run_dir.join("judged")
    }

    /// The folder of the cache that `train` and `eval` read.
    pub fn training_cache(&self) -> PathBuf {
        self.data.cache.clone().unwrap_or_else(|| self.own_cache())
    }

    /// The folder that `train` writes the student to.
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
