//! A student that is distilled from itself over HTTP must have a zero gradient. A bias anywhere in the pipeline
//! (tokens, template, alignment, loss, precision) would make the gradient non-zero.

use std::path::Path;

use candle_core::{DType, Tensor};
use distill::cache::writer::Cache;
use distill::config::{self, Config};
use distill::data::batch::Batch;
use distill::data::dataset::Dataset;
use distill::harvest;
use distill::model::config::shape::ModelConfig;
use distill::model::tape::Activations;
use distill::model::weights::Tensors;
use distill::model::{Model, network, parameters};
use distill::ops::matmul::Precision;
use distill::serve::{self, ServeOptions};
use distill::signal::Signals;
use distill::tokenizer::Tokenizer;
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{EndToken, LossWeights, SoftTerm};
use distill::train::objective::{self, ModelPair};
use distill::train::soft_labels;
use distill::train::trainable::TrainableModel;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use crate::data::dataset;
use crate::harvest::quiet_options;
use crate::tiny;

/// Maximum number of tokens of a model's input.
const CONTEXT: usize = 128;
/// Number of tokens: the printable ASCII characters, the line feed, and the control tokens.
const VOCAB_SIZE: usize = 96 + tiny::CONTROL.len();
const PROMPTS: usize = 50;
const SAMPLES: u32 = 2;
/// Maximum norm of the gradient of the student's own soft labels, relative to the gradient of cross-entropy.
const MAX_GRADIENT: f64 = 1e-5;
/// Like [`MAX_GRADIENT`], for a step in bf16 with soft labels in f32: rounding errors are correlated across positions.
const MAX_GRADIENT_BF16: f64 = 0.5;
/// Maximum [`deviation`] of gradients whose expectation is zero.
const MAX_DEVIATION: f64 = 3.0;

/// Returns the name and the `config.json` of each architecture.
fn architectures(vocab_size: usize) -> [(&'static str, Value); 6] {
    let llama = |model_type: &str, other_fields: Value| {
        let mut config = json!({
            "model_type": model_type, "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": false,
        });
        for (name, value) in other_fields.as_object().unwrap() {
            config[name] = value.clone();
        }
        config
    };
    let gpt2 = json!({
        "model_type": "gpt2", "vocab_size": vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": CONTEXT, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    });
    let t5 = json!({
        "model_type": "t5", "vocab_size": vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false,
        "decoder_start_token_id": vocab_size - 3, "eos_token_id": vocab_size - 1,
    });
    [
        ("llama", llama("llama", json!({}))),
        ("mistral", llama("mistral", json!({"sliding_window": 16}))),
        ("qwen2", llama("qwen2", json!({}))),
        ("qwen3", llama("qwen3", json!({}))),
        ("gpt2", gpt2),
        ("t5", t5),
    ]
}

/// Writes a model whose answers are ASCII with one token per character, and sometimes end.
fn write_model(dir: &Path, config: &Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let ascii = std::iter::once(b'\n').chain(32..127);
    tiny::write_tokenizer(dir, ascii, &[]);
    let config = ModelConfig::load(dir).unwrap();
    let mut weights = parameters::random_weights(&config, 3).unwrap();
    let is_head = |name: &str| name == "lm_head.weight" || name.ends_with("wte.weight");
    for (name, tensor) in &mut weights {
        let is_norm = name.contains("norm") || name.contains("ln_");
        // The initial weights of a T5 are large, above all those of its head.
        let scale = match (config.is_encoder_decoder(), is_head(name)) {
            (false, _) if !is_norm => 12.0,
            (true, true) => 0.24,
            _ => 1.0,
        };
        *tensor = (&*tensor * scale).unwrap();
        if is_head(name) {
            *tensor = with_likely_end(tensor);
        }
        // Real models are published in bf16, so a step in bf16 does not round their weights.
        let rounded = tensor.to_dtype(DType::BF16).unwrap();
        *tensor = rounded.to_dtype(DType::F32).unwrap();
    }
    tiny::write_weights(dir, &config.to_file_layout(&weights).unwrap());
}

/// Makes an LM head (V x D) that often selects the last token, and rarely the control tokens before it.
fn with_likely_end(head: &Tensor) -> Tensor {
    let mut rows = head.to_vec2::<f32>().unwrap();
    for value in rows.iter_mut().flatten() {
        *value *= 3.5;
    }
    let [.., control_a, control_b, end] = &mut rows[..] else {
        unreachable!("control tokens come last")
    };
    control_a.fill(0.0);
    control_b.fill(0.0);
    end.iter_mut().for_each(|value| *value *= 2.0);
    Tensor::new(rows, head.device()).unwrap()
}

/// Serves the model in `model_dir`, and harvests its answers into `run` over HTTP.
async fn harvest_model(model_dir: &Path, prompts: &Path, run: &Path) -> Config {
    let options = ServeOptions {
        port: 0,
        model_name: Some("self".into()),
        batch_size: 16,
        ..ServeOptions::default()
    };
    let server = serve::start(model_dir, options).unwrap();
    let mut config = Config {
        run_dir: run.join("run"),
        ..Config::default()
    };
    config.teacher.base_url = server.base_url();
    config.teacher.model = "self".into();
    config.teacher.api_key_env = String::new();
    config.prompts.source = prompts.into();
    config.prompts.limit = Some(PROMPTS);
    config.prompts.samples = SAMPLES;
    config.sampling.temperature = Some(1.0);
    config.sampling.top_logprobs = 20;
    config.sampling.max_tokens = 24;
    config.sampling.seed = Some(2);
    config.limits.concurrency = 16;
    config.student.path = model_dir.into();
    config.data.validation_share = 0.0;
    config.data.keep_finish_reasons = vec!["stop".into(), "length".into()];
    let (_sender, receiver) = unbounded_channel();
    let summary = harvest::run_until(&config, quiet_options(), Signals::from_channel(receiver));
    let summary = summary.await.unwrap();
    assert_eq!(summary.failed + summary.pending, 0, "{summary:?}");
    config
}

/// Copies a cache without the logprobs of end tokens, which most endpoints do not report.
fn copy_without_end_logprobs(source: &Path, target: &Path) {
    let cache = Cache::open(target, &config::CacheConfig::default()).unwrap();
    for record in distill::cache::reader::read(source).unwrap() {
        let mut record = record.unwrap();
        let has_ended = record.answer.finish_reason == "stop";
        if let Some(logprobs) = record.logprobs.as_mut().filter(|_| has_ended) {
            logprobs.token.pop();
            logprobs.logprob.pop();
            logprobs.top.pop();
            logprobs.top_logprob.pop();
        }
        cache.append(&record).unwrap();
    }
}

/// Inputs from which the gradient of each example is computed.
struct GradientInputs<'a> {
    student: &'a TrainableModel,
    teacher: Option<&'a Model>,
    data: &'a Dataset,
    end: Option<EndToken>,
}

impl GradientInputs<'_> {
    /// Returns the gradient of each example with respect to all parameters.
    fn compute(&self, term: SoftTerm) -> Vec<Vec<f32>> {
        let weights = LossWeights {
            soft: [term; 2],
            end: self.end,
            ..LossWeights::default()
        };
        let models = ModelPair {
            student: &self.student.model,
            teacher: self.teacher,
        };
        let examples = self.data.train();
        let gradient = |example| {
            let batch = Batch::new(std::iter::once(example));
            let mut gradients = self.student.model.gradients();
            let activations = Activations::Keep;
            objective::gradients(models, &batch, weights, activations, &mut gradients).unwrap();
            let vars = self.student.vars.values();
            let parts = vars.map(|var| gradients.get_tape(var.as_tensor()).unwrap_or_default());
            parts.collect::<Vec<_>>().concat()
        };
        examples.iter().map(gradient).collect()
    }
}

fn soft_term(divergence: Divergence, weight: f32) -> SoftTerm {
    SoftTerm { divergence, weight }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b);
    products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Returns the norm of the sum of the gradients.
fn norm(gradients: &[Vec<f32>]) -> f64 {
    let mut sum = vec![0.0; gradients[0].len()];
    for gradient in gradients {
        sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    }
    dot(&sum, &sum).sqrt()
}

/// Estimates the squared norm of the expected gradient, in standard errors: the mean dot product of the gradients of
/// two examples. If the expected gradient is zero, the expected dot product is zero.
fn deviation(gradients: &[Vec<f32>]) -> f64 {
    let mut sum = 0.0;
    let mut squares = 0.0;
    for (index, a) in gradients.iter().enumerate() {
        for b in &gradients[..index] {
            let product = dot(a, b);
            sum += product;
            squares += product * product;
        }
    }
    sum / squares.sqrt()
}

/// Writes a model into `dir` and harvests its answers into `run`.
async fn harvest_architecture(config: &Value, dir: &Path, run: &Path) -> Config {
    write_model(dir, config);
    let prompts = run.join("prompts.txt");
    let lines: String = (0..PROMPTS).map(|n| format!("Prompt {n}\n")).collect();
    std::fs::write(&prompts, lines).unwrap();
    harvest_model(dir, &prompts, run).await
}

#[tokio::test(flavor = "multi_thread")]
async fn student_distilled_from_itself_has_zero_gradient() {
    for (name, config) in architectures(VOCAB_SIZE) {
        let dir = tempfile::tempdir().unwrap();
        let run = tempfile::tempdir().unwrap();
        let config = harvest_architecture(&config, dir.path(), run.path()).await;
        let answers = config.own_cache().join("responses.jsonl");
        let answers = std::fs::read_to_string(answers).unwrap();
        let tokenizer = Tokenizer::for_student(&config.student).unwrap();
        let data = dataset::load(&config, &tokenizer).unwrap();
        let report = &data.report;
        assert!(report.ce_only.is_empty(), "{name}: {report}");
        assert_eq!(report.positions, report.soft_positions, "{name}: {report}");
        let has_ended = |line: &&str| line.contains("\"stop\"");
        let ended = answers.lines().filter(has_ended).count();
        assert!(
            ended > PROMPTS / 10,
            "{name}: only {ended} answers have an end token"
        );
        let mut teacher = Model::load(dir.path()).unwrap();
        let (shape, weights) = network::load(dir.path()).unwrap();
        let mut student = TrainableModel::new(shape, weights, Tensors::new(), |_| false).unwrap();
        for (precision, max_gradient) in [
            (Precision::F32, MAX_GRADIENT),
            (Precision::Bf16, MAX_GRADIENT_BF16),
        ] {
            student.model.set_precision(precision);
            teacher.set_precision(precision);
            let inputs = GradientInputs {
                student: &student,
                teacher: None,
                data: &data,
                end: None,
            };
            let ce_gradients = inputs.compute(soft_term(Divergence::Tail, 0.0));
            let scale = norm(&ce_gradients);
            let other_divergences = [
                Divergence::Temperature(2.0),
                Divergence::ReverseKl,
                Divergence::Jsd(0.5),
                Divergence::SkewKl(0.1),
                Divergence::SkewReverseKl(0.1),
            ];
            let other_divergences = other_divergences
                .iter()
                .filter(|_| precision == Precision::F32);
            for &divergence in [Divergence::Tail].iter().chain(other_divergences) {
                let share = norm(&inputs.compute(soft_term(divergence, 1.0))) / scale;
                assert!(
                    share < max_gradient,
                    "{name}, {precision:?}, {divergence}: {share:e}"
                );
            }
            let mut zero_in_expectation = vec![("cross-entropy", ce_gradients)];
            if precision == Precision::F32 {
                // `Damped(1.0)` is `unbiased`. At a match, a smaller lambda only scales the gradient.
                zero_in_expectation.push((
                    "unbiased",
                    inputs.compute(soft_term(Divergence::Damped(1.0), 1.0)),
                ));
            }
            for (loss, gradients) in zero_in_expectation {
                let deviation = deviation(&gradients);
                assert!(
                    deviation < MAX_DEVIATION,
                    "{name}, {precision:?}, {loss}: {deviation}"
                );
            }
            let with_local_teacher = GradientInputs {
                teacher: Some(&teacher),
                ..inputs
            };
            let share = norm(&with_local_teacher.compute(soft_term(Divergence::Tail, 1.0))) / scale;
            assert!(
                share < MAX_GRADIENT,
                "{name}, {precision:?}, dense: {share:e}"
            );
        }
    }
}

/// The tokenizer of this trained model has merges, so it may split an answer into other tokens than were generated.
#[tokio::test(flavor = "multi_thread")]
async fn trained_model_distilled_from_itself_has_a_tiny_gradient() {
    let example_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/reminders");
    let run = tempfile::tempdir().unwrap();
    let dir = example_dir.join("teacher");
    let config = harvest_model(&dir, &example_dir.join("prompts.jsonl"), run.path()).await;
    let tokenizer = Tokenizer::for_student(&config.student).unwrap();
    let data = dataset::load(&config, &tokenizer).unwrap();
    let (shape, weights) = network::load(&dir).unwrap();
    let student = TrainableModel::new(shape, weights, Tensors::new(), |_| false).unwrap();
    let inputs = GradientInputs {
        student: &student,
        teacher: None,
        data: &data,
        end: None,
    };
    let scale = norm(&inputs.compute(soft_term(Divergence::Tail, 0.0)));
    let share = norm(&inputs.compute(soft_term(Divergence::Tail, 1.0))) / scale;
    assert!(share < 10.0 * MAX_GRADIENT, "{share:e}: {}", data.report);
}

#[tokio::test(flavor = "multi_thread")]
async fn student_distilled_from_itself_without_end_logprobs_has_no_bias() {
    let [(_, llama), ..] = architectures(VOCAB_SIZE);
    let dir = tempfile::tempdir().unwrap();
    let run = tempfile::tempdir().unwrap();
    let mut config = harvest_architecture(&llama, dir.path(), run.path()).await;
    let without_ends = run.path().join("without-ends");
    copy_without_end_logprobs(&config.own_cache(), &without_ends);
    config.data.cache = Some(without_ends);
    let tokenizer = Tokenizer::for_student(&config.student).unwrap();
    let data = dataset::load(&config, &tokenizer).unwrap();
    let report = &data.report;
    assert!(report.misses_ends() && report.ends > 0, "{report}");
    assert_eq!(report.positions - report.soft_positions, report.ends);
    let choice = soft_labels::choose(&config.loss, report, Some(0), false).unwrap();
    let note = format!(
        "{0} of {0} end tokens of answers have no logprobs",
        report.ends
    );
    assert!(choice.notes.join("\n").contains(&note), "{choice:?}");
    let (shape, weights) = network::load(dir.path()).unwrap();
    let student = TrainableModel::new(shape, weights, Tensors::new(), |_| false).unwrap();
    let deviation_of = |divergence, end| {
        let inputs = GradientInputs {
            student: &student,
            teacher: None,
            data: &data,
            end,
        };
        deviation(&inputs.compute(soft_term(divergence, 1.0)))
    };
    // `is_listed` applies only to answers without `lists_end`; these answers have it.
    let end = tokenizer.end_of_turn().map(|token| EndToken {
        token,
        is_listed: true,
    });
    assert!(end.is_some());
    for divergence in [
        Divergence::Tail,
        Divergence::Damped(0.35),
        Divergence::ReverseKl,
    ] {
        let biased = deviation_of(divergence, None);
        let corrected = deviation_of(divergence, end);
        assert!(corrected < MAX_DEVIATION, "{divergence}: {corrected}");
        assert!(biased > MAX_DEVIATION, "{divergence}: {biased}");
    }
}
