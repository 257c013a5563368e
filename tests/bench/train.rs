//! Times training steps on random tokens; see `tests/bench/train.sh`. `train.py` does the same with PyTorch.
//!
//! `train [--shape NAME] [--batch N] [--length N] [--source N] [--vocabulary N] [--prompt SHARE] [--k N] [--steps N] [--threads N]
//! [--dtype f32|bf16] [--lora RANK] [--checkpoint]` prints a line of JSON.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use distill::config;
use distill::data::batch::Batch;
use distill::model::config::shape::ModelConfig;
use distill::model::lora;
use distill::model::parameters::random_weights;
use distill::model::tape::Activations;
use distill::model::weights::Tensors;
use distill::ops::matmul::Precision;
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, SoftTerm};
use distill::train::objective;
use distill::train::optimizer::Optimizer;
use distill::train::trainable::TrainableModel;
use serde_json::json;

/// Settings of the timed steps.
struct Case {
    shape: ModelShape,
    vocabulary: usize,
    batch: usize,
    length: usize,
    /// Length of each source of an encoder-decoder.
    source: usize,
    /// Share of each sequence that is a prompt, without supervised positions.
    prompt: f64,
    k: usize,
    steps: usize,
    threads: usize,
    activations: Activations,
    precision: Precision,
    /// Rank of the adapters; 0 for a full fine-tune.
    lora: usize,
}

enum ModelShape {
    Llama(Box<config::StudentConfig>),
    T5Small,
}

fn main() -> Result<()> {
    // The program does the same at its start.
    distill::ops::process::configure();
    let case = Case::from_args()?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(case.threads)
        .build()?;
    pool.install(|| time(&case))
}

impl Case {
    fn from_args() -> Result<Self> {
        let mut options: HashMap<String, String> = HashMap::new();
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = match name.as_str() {
                "--checkpoint" => String::new(),
                _ => arguments
                    .next()
                    .with_context(|| format!("{name} needs a value"))?,
            };
            options.insert(name, value);
        }
        let mut number = |name: &str, default: usize| -> Result<usize> {
            let given = options.remove(name);
            given.map_or(Ok(default), |text| text.parse().context("not a number"))
        };
        let batch = number("--batch", 0)?;
        let length = number("--length", 0)?;
        let source = number("--source", 512)?;
        let k = number("--k", 20)?;
        let steps = number("--steps", 5)?;
        let threads = number("--threads", 2)?;
        let vocabulary = number("--vocabulary", 0)?;
        let lora = number("--lora", 0)?;
        let prompt = options.remove("--prompt").unwrap_or("0".into()).parse()?;
        let precision = match options.remove("--dtype").as_deref() {
            None | Some("f32") => Precision::F32,
            Some("bf16") => Precision::Bf16,
            _ => bail!("--dtype must be f32 or bf16"),
        };
        let activations = match options.remove("--checkpoint") {
            Some(_) => Activations::Recompute,
            None => Activations::Keep,
        };
        let shape = |hidden, inner, layers, heads, key_value| config::StudentConfig {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: key_value,
            max_position_embeddings: length.max(256),
            ..config::StudentConfig::default()
        };
        let name = options.remove("--shape").unwrap_or("135m".into());
        let (shape, own_vocabulary, own_batch, own_length) = match name.as_str() {
            "135m" => (
                ModelShape::Llama(Box::new(shape(576, 1536, 30, 9, 3))),
                49_152,
                4,
                256,
            ),
            "tiny" => (
                ModelShape::Llama(Box::new(shape(256, 704, 6, 4, 2))),
                8_192,
                8,
                256,
            ),
            "t5-small" => (ModelShape::T5Small, 32_128, 8, 64),
            _ => bail!("--shape must be 135m, tiny or t5-small"),
        };
        if let Some(name) = options.keys().next() {
            bail!("{name} is not an option");
        }
        Ok(Self {
            vocabulary: if vocabulary > 0 {
                vocabulary
            } else {
                own_vocabulary
            },
            batch: if batch > 0 { batch } else { own_batch },
            length: if length > 0 { length } else { own_length },
            source: match shape {
                ModelShape::Llama(_) => 0,
                ModelShape::T5Small => source,
            },
            shape,
            prompt,
            k,
            steps,
            threads,
            activations,
            precision,
            lora,
        })
    }

    fn config(&self) -> Result<ModelConfig> {
        match &self.shape {
            ModelShape::Llama(shape) => {
                ModelConfig::from_student(shape, self.vocabulary, &[], None)
            }
            ModelShape::T5Small => {
                let dir = tempfile::tempdir()?;
                let json = json!({
                    "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
                    "vocab_size": self.vocabulary, "decoder_start_token_id": 0,
                });
                std::fs::write(dir.path().join("config.json"), json.to_string())?;
                ModelConfig::load(dir.path())
            }
        }
    }

    /// Returns a batch of random tokens. In each sequence, the tokens after the prompt are supervised.
    fn random_batch(&self) -> Batch {
        let mut random = fastrand::Rng::with_seed(0);
        let mut batch = Batch {
            soft_offsets_N1: vec![0],
            ..Batch::default()
        };
        let first = (self.prompt * self.length as f64) as usize;
        for sequence in 0..self.batch {
            let start = sequence * self.length;
            batch.segments_B.push(start..start + self.length);
            batch.keys_B.push(sequence.to_string());
            if self.source > 0 {
                let start = batch.source_ids_U.len();
                let ids = (0..self.source).map(|_| random.u32(0..self.vocabulary as u32));
                batch.source_ids_U.extend(ids);
                batch.source_segments_B.push(start..start + self.source);
            }
            for at in 0..self.length {
                batch
                    .input_ids_T
                    .push(random.u32(0..self.vocabulary as u32));
                if at < first {
                    continue;
                }
                batch.positions_N.push((start + at) as u32);
                batch.labels_N.push(random.u32(0..self.vocabulary as u32));
                let soft = random.choose_multiple(0..self.vocabulary as u32, self.k);
                let share = 0.95 / self.k.max(1) as f32;
                batch
                    .soft_logprobs_NK
                    .extend(soft.iter().map(|_| share.ln()));
                batch.soft_ids_NK.extend(soft);
                batch.soft_offsets_N1.push(batch.soft_ids_NK.len());
            }
        }
        batch
    }
}

fn time(case: &Case) -> Result<()> {
    let config = case.config()?;
    let adapters = match case.lora {
        0 => Tensors::new(),
        rank => lora::new_adapters(&config, rank, &[], 0)?,
    };
    let mut student = TrainableModel::new(
        config.clone(),
        random_weights(&config, 0)?,
        adapters,
        |_| false,
    )?;
    student.model.set_precision(case.precision);
    let mut optimizer = Optimizer::new(&student, &[])?;
    let mut gradients = student.model.gradients();
    let batch = case.random_batch();
    let settings = config::TrainConfig::default();
    let weights = LossWeights {
        soft: [SoftTerm {
            divergence: Divergence::Tail,
            weight: 0.5,
        }; 2],
        scale: 1.0 / batch.positions_N.len() as f32,
        ..LossWeights::default()
    };
    let mut seconds = Vec::new();
    let mut losses = Vec::new();
    for step in 0..=case.steps {
        let began = Instant::now();
        let (loss, _) = objective::gradients(
            &student.model,
            &batch,
            weights,
            case.activations,
            &mut gradients,
        )?;
        let norm = optimizer.gradient_norm(&gradients)?;
        optimizer.update(&settings, 1e-4, norm, &gradients)?;
        gradients.clear();
        losses.push(loss);
        // The first step warms up.
        if step > 0 {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    let tokens = (case.batch * (case.source + case.length)) as f64;
    println!(
        "{}",
        json!({
            "parameters": student.vars.values().map(|v| v.elem_count()).sum::<usize>(),
            "tokens_per_s": seconds.iter().map(|s| tokens / s).collect::<Vec<_>>(),
            "losses": losses,
            "peak_mib": peak_mib()?,
        })
    );
    Ok(())
}

/// Returns the peak memory of this process in MiB.
fn peak_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.context("no VmHWM")?.parse::<f64>()? / 1024.0)
}
