//! Settings of a harvest run, built once from the config.

use std::path::PathBuf;

use anyhow::Result;

use crate::config;
use crate::config::{
    BatchConfig, CacheConfig, Config, EndpointConfig, OnMissingLogprobs, PromptsConfig,
    RetryConfig, ScheduleConfig,
};
use crate::exit::Exit;

/// Reason why `distill train` with the config of a harvest would not train on its answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TrainingObstacle {
    /// `data.cache` is the cache of another run.
    OtherCache,
    /// The folder `student.path` has no `tokenizer.json`.
    NoStudent,
}

/// Settings of a harvest run. Batch mode and scoring derive their own settings from them.
#[derive(Debug, Clone)]
pub(crate) struct RunSettings {
    pub run_dir: PathBuf,
    /// The cache that the run writes.
    pub cache_dir: PathBuf,
    pub cache: CacheConfig,
    pub endpoints: Vec<EndpointConfig>,
    pub prompts: PromptsConfig,
    pub budget_usd: Option<f64>,
    pub retry: RetryConfig,
    pub schedule: ScheduleConfig,
    pub batch: BatchConfig,
    pub on_missing_logprobs: OnMissingLogprobs,
    /// True if `data.teacher_tokenizer` is set, so that logprobs whose tokens are given by id can be used.
    pub has_teacher_tokenizer: bool,
    /// `data.keep_finish_reasons`; empty if the answers are not for training.
    pub keep_finish_reasons: Vec<String>,
    /// Command-line flags that select this config, for commands that messages recommend.
    pub arguments: String,
    /// Reason why `distill train` with this config would not train on the answers; `None` if it would.
    pub before_training: Option<TrainingObstacle>,
}

impl RunSettings {
    /// Collects the settings of the config.
    ///
    /// # Errors
    /// [`Exit::Usage`] if an endpoint has no model.
    pub(crate) fn new(config: &Config) -> Result<RunSettings> {
        let endpoints = config.endpoints();
        if endpoints
            .iter()
            .any(|endpoint| endpoint.teacher.model.is_empty())
        {
            let message = "set `teacher.model` to the name of the teacher's model";
            return Err(Exit::Usage(message.into()).into());
        }
        let has_student = config.student.path.join("tokenizer.json").exists();
        let before_training = match &config.data.cache {
            Some(_) => Some(TrainingObstacle::OtherCache),
            None if !has_student => Some(TrainingObstacle::NoStudent),
            None => None,
        };
        Ok(RunSettings {
            run_dir: config.run_dir.clone(),
            cache_dir: config.own_cache(),
            cache: config.cache.clone(),
            endpoints,
            prompts: config.prompts.clone(),
            budget_usd: config.budget.usd,
            retry: config.retry.clone(),
            schedule: config.schedule.clone(),
            batch: config.batch.clone(),
            on_missing_logprobs: config.harvest.on_missing_logprobs,
            keep_finish_reasons: config.data.keep_finish_reasons.clone(),
            has_teacher_tokenizer: config.data.teacher_tokenizer.is_some(),
            arguments: config.arguments(),
            before_training,
        })
    }

    /// Returns the settings of a run that writes to `run_dir`, with the given cache settings.
    pub(crate) fn in_folder(&self, run_dir: PathBuf, cache: CacheConfig) -> RunSettings {
        RunSettings {
            cache_dir: config::cache_dir(&run_dir),
            run_dir,
            cache,
            keep_finish_reasons: Vec::new(),
            ..self.clone()
        }
    }

    /// Returns the settings with the prices of batch mode.
    pub(crate) fn at_batch_prices(&self) -> RunSettings {
        let mut settings = self.clone();
        for endpoint in &mut settings.endpoints {
            endpoint.price = endpoint.price.discounted(self.batch.discount);
        }
        settings
    }

    /// Scales the concurrency of the endpoints down to a total of about `max`; each endpoint keeps at least 1.
    pub(crate) fn limit_concurrency(&mut self, max: usize) {
        let total = self.concurrency().max(1);
        for endpoint in &mut self.endpoints {
            let limits = &mut endpoint.limits;
            limits.concurrency = (limits.concurrency * max / total).max(1);
        }
    }

    /// Returns the maximum number of requests in flight over all endpoints.
    pub(crate) fn concurrency(&self) -> usize {
        let endpoints = self.endpoints.iter();
        endpoints.map(|endpoint| endpoint.limits.concurrency).sum()
    }
}
