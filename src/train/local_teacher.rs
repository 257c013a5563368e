//! Local teacher: a model folder (`teacher.local`) whose distributions over the whole vocabulary are the soft labels.
//!
//! The teacher is frozen or co-trained. A co-trained teacher is trained by cross-entropy on the student's examples,
//! which adapts it to their text.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::{KdMode, LossConfig, SaveDtype, TeacherConfig, TrainConfig};
use crate::data::prepared::shard::ExampleView;
use crate::exit::Exit;
use crate::model::weights;
use crate::model::weights::Tensors;
use crate::model::{Model, network};
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
use crate::train::optimizer::Optimizer;
use crate::train::soft_labels::SoftLabelChoice;
use crate::train::step::{StepBatch, StepResult, Stepper};
use crate::train::trainable::TrainableModel;
use crate::train::{device, model_card};

/// A local teacher, and its optimizer if it is co-trained.
pub struct LocalTeacher {
    pub trainable: TrainableModel,
    /// None for a frozen teacher.
    pub training: Option<Cotraining>,
    /// The folder `teacher.local`.
    dir: PathBuf,
    /// Hash of the weights before training.
    hash: String,
}

/// Optimizer of a co-trained teacher.
pub struct Cotraining {
    pub optimizer: Optimizer,
    /// Ratio of the teacher's learning rate to the student's.
    learning_rate_ratio: f64,
    stepper: Stepper,
}

impl LocalTeacher {
    /// Loads `teacher.local`; None if it is not set.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the folder is not a model folder, or its tokenizer differs from the student's. Another error
    /// if the model does not load.
    pub fn from_config(
        settings: &TeacherConfig,
        train: &TrainConfig,
        loss: &LossConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>> {
        let Some(dir) = &settings.local else {
            return Ok(None);
        };
        let cotrain = settings.cotrain;
        check_tokenizer(dir, tokenizer)?;
        if loss.kd == KdMode::None && !cotrain {
            tracing::warn!("`teacher.local` is not used, because `loss.kd` is \"none\"");
        }
        let (shape, tensors) = network::load(dir)?;
        let hash = weights::hash(&tensors)?;
        let tensors = weights::to_device(&tensors, &device::open(train)?)?;
        let mut trainable = TrainableModel::new(shape, tensors, Tensors::new(), |_| !cotrain)
            .with_context(|| format!("cannot load `teacher.local` {}", dir.display()))?;
        trainable.model.set_precision(device::precision(train));
        let training = cotrain.then(|| -> Result<_> {
            Ok(Cotraining {
                optimizer: Optimizer::new(&trainable, &train.no_decay)?,
                learning_rate_ratio: settings.cotrain_rate,
                stepper: Stepper::new(
                    train,
                    loss,
                    &SoftLabelChoice::default(),
                    None,
                    &trainable.model,
                ),
            })
        });
        Ok(Some(Self {
            training: training.transpose()?,
            trainable,
            dir: dir.clone(),
            hash,
        }))
    }

    /// Returns the folder that the teacher was loaded from.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the hash of the weights before training.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Trains the teacher by cross-entropy on `examples` in step `step`; `learning_rate` is the student's. Returns None
    /// for a frozen teacher.
    ///
    /// # Errors
    /// If [`Stepper::run`] fails.
    pub fn train_step(
        &mut self,
        step: u64,
        examples: &[ExampleView],
        learning_rate: f64,
    ) -> Result<Option<StepResult>> {
        let Some(training) = &mut self.training else {
            return Ok(None);
        };
        let trainable = (&self.trainable, &mut training.optimizer);
        let batch = StepBatch::from_examples(examples);
        let learning_rate = learning_rate * training.learning_rate_ratio;
        let result = training
            .stepper
            .run(trainable, None, step, &batch, learning_rate);
        result.context("cannot train the teacher").map(Some)
    }

    /// Writes a co-trained teacher to the folder `dir`. Does nothing for a frozen teacher.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn save(&self, dir: &Path, dtype: SaveDtype, tokenizer: &Tokenizer) -> Result<()> {
        if self.training.is_none() {
            return Ok(());
        }
        self.trainable.save(
            dir,
            &self.trainable.with(self.trainable.trained()?),
            dtype,
            (&self.dir, tokenizer),
            &model_card::teacher_card(&self.dir, self.trainable.model.config(), tokenizer),
        )?;
        Ok(())
    }
}

/// Loads the model in `dir` as the teacher of a comparison with a student that uses `tokenizer`.
///
/// # Errors
/// [`Exit::Usage`] if `dir` is not a model folder, or its tokenizer differs from `tokenizer`. Another error if the
/// model does not load.
pub(crate) fn load_frozen(dir: &Path, tokenizer: &Tokenizer, train: &TrainConfig) -> Result<Model> {
    check_tokenizer(dir, tokenizer)?;
    let mut model = Model::load(dir)?;
    model.set_precision(device::precision(train));
    Ok(model)
}

/// Warns if teacher and student, two encoder-decoders, read different source texts.
fn warn_about_source(dir: &Path, teacher: &Tokenizer, student: &Tokenizer) {
    let messages = [Message::new("system", "a"), Message::new("user", "b")];
    let source = |tokenizer: &Tokenizer| tokenizer.encode_prompt(&messages).ok();
    if student.is_encoder_decoder() && source(teacher) != source(student) {
        tracing::warn!(
            "`teacher.local` {} has another source template than the student, and reads the student's source text: set \
             `student.source_template` to the teacher's",
            dir.display()
        );
    }
}

/// Checks that `dir` is a model folder, and that teacher and student have the same tokens: otherwise their
/// distributions cannot be compared.
fn check_tokenizer(dir: &Path, student: &Tokenizer) -> Result<()> {
    if !dir.join("config.json").is_file() {
        bail!(Exit::Usage(format!(
            "`teacher.local`: {} is not a model folder (it has no config.json): set `teacher.local` to the folder of a \
             Hugging Face model, or remove it",
            dir.display()
        )));
    }
    let teacher = Tokenizer::load(dir)
        .with_context(|| format!("cannot load `teacher.local` {}", dir.display()))?;
    if teacher.decoder_start() != student.decoder_start() {
        let kind = |tokenizer: &Tokenizer| match tokenizer.decoder_start() {
            Some(start) => format!("an encoder-decoder that starts with token {start}"),
            None => "a decoder".into(),
        };
        bail!(Exit::Usage(format!(
            "`teacher.local` {} is {}, and the student is {}: their inputs differ. To distill between them, harvest \
             answers from `distill serve --model {}`",
            dir.display(),
            kind(&teacher),
            kind(student),
            dir.display()
        )));
    }
    let Some(id) = teacher.first_difference(student) else {
        warn_about_source(dir, &teacher, student);
        return Ok(());
    };
    let name = |tokenizer: &Tokenizer| match tokenizer.token_name(id) {
        name if name.is_empty() => "undefined".to_owned(),
        name => format!("{name:?}"),
    };
    bail!(Exit::Usage(format!(
        "the tokenizer of `teacher.local` {} differs from the student's: token {id} is {} for the teacher, and {} for \
         the student. To distill across tokenizers, harvest answers from `distill serve --model {}`: their tokens are \
         aligned by bytes",
        dir.display(),
        name(&teacher),
        name(student),
        dir.display()
    )))
}
