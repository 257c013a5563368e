//! A teacher on this machine: nothing of its distributions is hidden, as it is behind an API.
//!
//! It is frozen, or trained together with the student: by cross-entropy on the same examples, which
//! makes it a teacher of the very text that the student learns.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::config::{Config, TrainConfig};
use crate::data::prepared::shard::ExampleView;
use crate::exit::Exit;
use crate::model::weights;
use crate::model::weights::Tensors;
use crate::model::{Model, decoder};
use crate::tokenizer::Tokenizer;
use crate::train::optimizer::Optimizer;
use crate::train::soft_labels::Choice;
use crate::train::step::{Lesson, Stepper, Taken};
use crate::train::student;
use crate::train::student::Student;
use crate::train::{device, model_card};

/// The model, and what trains it.
pub struct Teacher {
    pub learner: Student,
    /// Where it is not frozen.
    pub training: Option<Training>,
    /// A hash of its weights as they were loaded.
    hash: String,
}

/// What a teacher that is trained has besides its weights.
pub struct Training {
    pub optimizer: Optimizer,
    /// Its learning rate, as a share of the student's.
    rate: f64,
    stepper: Stepper,
}

impl Teacher {
    /// The teacher that the config names, if it does.
    ///
    /// # Errors
    /// Where it does not load, or its tokenizer is not the student's ([`Exit::Usage`]).
    pub fn of(config: &Config, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(dir) = &config.teacher.local else {
            return Ok(None);
        };
        let (train, cotrain) = (&config.train, config.teacher.cotrain);
        check_tokenizer(dir, tokenizer)?;
        let (shape, tensors) = decoder::load(dir)?;
        let hash = weights::hash(&tensors)?;
        let tensors = weights::to_device(&tensors, &device::of(train)?)?;
        let everything = [String::new()];
        let freeze = student::patterns(if cotrain { &[] } else { &everything })?;
        let mut learner = Student::new(shape, tensors, Tensors::new(), &freeze)
            .with_context(|| format!("cannot load teacher.local {}", dir.display()))?;
        learner.model.set_precision(device::precision(train));
        let training = cotrain.then(|| -> Result<_> {
            let no_decay = student::patterns(&train.no_decay)?;
            Ok(Training {
                optimizer: Optimizer::new(&learner, &no_decay)?,
                rate: config.teacher.cotrain_rate,
                stepper: Stepper::new(config, &Choice::default(), None, &learner.model),
            })
        });
        Ok(Some(Self {
            training: training.transpose()?,
            learner,
            hash,
        }))
    }

    /// A hash of its weights as they were loaded.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Takes step `step` on `examples` where it is trained, by cross-entropy; `learning_rate` is the
    /// student's.
    ///
    /// # Errors
    /// As [`Stepper::take`].
    pub fn learn(
        &mut self,
        step: u64,
        examples: &[ExampleView],
        learning_rate: f64,
    ) -> Result<Option<Taken>> {
        let Some(training) = &mut self.training else {
            return Ok(None);
        };
        let learner = (&self.learner, &mut training.optimizer);
        let lesson = Lesson::of(examples);
        let learning_rate = learning_rate * training.rate;
        let taken = training
            .stepper
            .take(learner, None, step, &lesson, learning_rate);
        taken.context("the teacher").map(Some)
    }

    /// Writes its folder into `run_dir`, where it was trained.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn save(&self, config: &Config, tokenizer: &Tokenizer) -> Result<()> {
        let (Some(dir), Some(_)) = (&config.teacher.local, &self.training) else {
            return Ok(());
        };
        self.learner.save(
            &config.run_dir.join("teacher"),
            &self.learner.with(self.learner.trained()?),
            config.student.save_dtype,
            (dir, tokenizer),
            &model_card::of_teacher(config, self.learner.model.config().model_type()),
        )?;
        Ok(())
    }
}

/// The teacher of `dir`, to compare a model with that has this tokenizer.
///
/// # Errors
/// Where it does not load, or its tokenizer is another ([`Exit::Usage`]).
pub(crate) fn frozen(dir: &Path, tokenizer: &Tokenizer, train: &TrainConfig) -> Result<Model> {
    check_tokenizer(dir, tokenizer)?;
    let mut model = Model::load(dir)?;
    model.set_precision(device::precision(train));
    Ok(model)
}

/// Distributions over the vocabulary can only be compared where both mean the same tokens.
fn check_tokenizer(dir: &Path, students: &Tokenizer) -> Result<()> {
    let teachers = Tokenizer::load(dir)?;
    let Some(id) = teachers.first_difference(students) else {
        return Ok(());
    };
    let name = |tokenizer: &Tokenizer| match tokenizer.token_name(id) {
        name if name.is_empty() => "nothing".to_owned(),
        name => format!("{name:?}"),
    };
    bail!(Exit::Usage(format!(
        "teacher.local {} has another tokenizer than the student: token {id} is {} there, and {} here. \
         To teach across tokenizers, harvest its answers from `distill serve --model {}`: they are \
         matched by their bytes",
        dir.display(),
        name(&teachers),
        name(students),
        dir.display()
    )))
}
