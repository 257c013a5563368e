//! The whole config, and values derived from several sections. `config.example.toml` documents every setting.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

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
    /// Values of the `--set` flags, as `section.key=value`.
    #[serde(skip)]
    pub flags: Vec<String>,
    /// Folder of this run, for the cache, checkpoints, metrics and the student.
    pub run_dir: PathBuf,
    pub teacher: TeacherConfig,
    /// Entries of `[[teachers]]`; keys that an entry omits have the values of `[teacher]`.
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
    /// Returns the command-line flags that select this config, quoted for a shell; empty if the config has no file.
    pub fn arguments(&self) -> String {
        let Some(file) = &self.file else {
            return String::new();
        };
        let mut words = vec!["-c".to_owned(), file.display().to_string()];
        for flag in &self.flags {
            words.extend(["--set".to_owned(), flag.clone()]);
        }
        let words = words.iter().map(String::as_str);
        // A text that contains a NUL byte cannot be an argument.
        shlex::try_join(words).unwrap_or_default()
    }

    /// Returns the settings of each endpoint: the entries of `[[teachers]]`, or `[teacher]` if there are none.
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

    /// Returns the cache folder of this run, which `harvest` writes.
    pub fn own_cache(&self) -> PathBuf {
        cache_dir(&self.run_dir)
    }

    /// Returns the cache folder that `train`, `eval` and `cache export` read.
    pub fn training_cache(&self) -> PathBuf {
        self.data.cache_folder(&self.run_dir)
    }

    /// Returns the model folder that `train` writes the student to.
    pub fn student_dir(&self) -> PathBuf {
        self.run_dir.join("student")
    }

    /// Returns the folder of the local teacher after it was trained together with the student.
    pub fn cotrained_teacher_dir(&self) -> PathBuf {
        self.run_dir.join("teacher")
    }
}

impl Config {
    /// Returns the settings that the trained weights depend on, as JSON, for a run of `total_steps` optimizer steps.
    /// The result is hashed, so the names and the order of the fields must not change.
    pub fn checkpoint_inputs(&self, total_steps: u64) -> Value {
        let settings = TrainConfig {
            // `epochs` affects the weights only through the number of steps.
            steps: Some(total_steps),
            epochs: 0.0,
            // These do not affect the weights after a given step, so a resumed run may change them.
            eval_every: 0,
            checkpoint_every: 0,
            keep_checkpoints: 0,
            patience: 0,
            threads: 0,
            activation_checkpointing: false,
            ..self.train.clone()
        };
        let teacher = &self.teacher;
        let has_remote_judge = self.train.on_policy && self.on_policy.judge != ScoredBy::Local;
        // The only endpoint of an on-policy run scores the student's answers.
        let endpoints = self.endpoints();
        let judge = endpoints
            .last()
            .filter(|_| has_remote_judge)
            .map(|endpoint| (&endpoint.teacher.base_url, &endpoint.teacher.model));
        // The caller hashes the contents of the files instead of their paths.
        let student = StudentConfig {
            path: PathBuf::new(),
            ..self.student.clone()
        };
        let on_policy = OnPolicyConfig {
            tokenizer: None,
            ..self.on_policy.clone()
        };
        let mut inputs = json!({
            "train": settings,
            "loss": &self.loss,
            "lora": &self.lora,
            "student": student,
            "teacher": { "cotrain": teacher.cotrain, "cotrain_rate": teacher.cotrain_rate },
            "on_policy": on_policy,
            "judge": judge,
        });
        remove_defaults(
            &mut inputs["student"],
            &StudentConfig::default(),
            &[
                "encoder_layers",
                "decoder_layers",
                "model_type",
                "source_template",
                "num_encoder_layers",
            ],
        );
        remove_defaults(
            &mut inputs["train"],
            &TrainConfig::default(),
            &["scale_parameter"],
        );
        inputs
    }

    /// Returns the settings that select the examples, as JSON, without the paths of the data, the teacher's tokenizer
    /// and the prompt source. If the data of a resumed run have changed, the error lists changes of these settings.
    pub fn example_settings(&self) -> Value {
        let teacher = &self.teacher;
        let mut settings = json!({
            "data": &self.data,
            "prompts": &self.prompts,
            "sampling": &self.sampling,
            "teacher": { "base_url": &teacher.base_url, "model": &teacher.model, "name": &teacher.name },
        });
        for (section, file) in [
            ("data", "source"),
            ("data", "cache"),
            ("data", "teacher_tokenizer"),
            ("prompts", "source"),
        ] {
            settings[section][file] = Value::Null;
        }
        let default = DataConfig::default();
        remove_defaults(&mut settings["data"], &default, &["max_source_length"]);
        settings
    }

    /// Returns true if training uses the soft labels of a cache.
    pub fn uses_cached_soft_labels(&self) -> bool {
        let is_from_cache = self.data.source.is_none() && self.teacher.local.is_none();
        self.loss.kd != KdMode::None && is_from_cache
    }
}

/// Removes the fields `names` of `settings` that have the value of `default`. Checkpoints of versions before these
/// fields can then be resumed.
fn remove_defaults<T: Serialize>(settings: &mut Value, default: &T, names: &[&str]) {
    let default = serde_json::to_value(default).unwrap_or_default();
    if let Some(fields) = settings.as_object_mut() {
        // `retain` keeps the order of the other fields, which the fingerprint depends on.
        fields.retain(|name, value| !names.contains(&name.as_str()) || *value != default[name]);
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
