//! Model cards: the README of a saved model.

use std::path::{Component, Path};

use crate::data::groups::GroupCounts;
use crate::model::config::shape::ModelConfig;
use crate::terminal::format_count;
use crate::tokenizer::Tokenizer;
use crate::train::summary::TrainSummary;

/// Returns the metadata of the card, in YAML.
fn head(model: &ModelConfig) -> String {
    let task = if model.is_encoder_decoder() {
        "text2text-generation"
    } else {
        "text-generation"
    };
    format!("---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- distillation\n---\n\n")
}

/// Returns the Hugging Face model card of the student `model`. `local_teacher` is the folder of the local teacher that was
/// used in training, if there was one; `initial_weights` describes weights that were taken from a bigger model.
pub(crate) fn student_card(
    local_teacher: Option<&Path>,
    batch_size: usize,
    (model, initial_weights): (&ModelConfig, Option<String>),
    tokenizer: &Tokenizer,
    summary: &TrainSummary,
) -> String {
    let line = |name: &str, value: Option<f64>| {
        value.map_or(String::new(), |v| format!("- validation {name}: {v:.4}\n"))
    };
    let teacher = match local_teacher {
        Some(dir) => model_name(dir),
        None => teachers(&summary.data.groups),
    };
    let initial_weights =
        initial_weights.map_or(String::new(), |text| format!("- initial weights: {text}\n"));
    format!(
        "{}A {} model of {} parameters, trained with `distill train`.\n\n{initial_weights}\
         - teacher: {teacher}\n- loss: {}\n- steps: {} of {} examples, {} tokens in all\n{}{}{}",
        head(model),
        model.model_type(),
        format_count(summary.parameters as u64),
        summary.loss,
        summary.steps,
        batch_size,
        format_count(summary.tokens),
        line("cross-entropy", summary.validation.ce),
        line("KL to the teacher", summary.validation.kl),
        usage(tokenizer),
    )
}

/// Returns the section of the card that shows how an encoder-decoder is called. It is empty for a decoder.
fn usage(tokenizer: &Tokenizer) -> String {
    if !tokenizer.is_encoder_decoder() {
        return String::new();
    }
    let template = tokenizer.source_template();
    let template = template.map_or(String::new(), |template| {
        // Longer than any fence inside the template.
        let mut fence = String::from("```");
        while template.contains(&fence) {
            fence.push('`');
        }
        format!(
            "The encoder reads the text of this template, which `chat_template.jinja` holds:\n\n\
             {fence}jinja\n{template}\n{fence}\n\n"
        )
    });
    let text = if tokenizer.has_own_template() {
        "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
    } else {
        "\"\\n\".join(message[\"content\"] for message in messages)"
    };
    // transformers' `apply_chat_template` alone does not add the token that ends the source.
    let end = if tokenizer.ends_sources() {
        ""
    } else {
        " + tokenizer.eos_token"
    };
    format!(
        "\n## Source text\n\n{template}```python\ntext = {text}\n\
         answer = model.generate(**tokenizer(text{end}, return_tensors=\"pt\"))\n```\n"
    )
}

/// Returns the last two components of a model's folder, such as `google/flan-t5-small`.
pub(crate) fn model_name(dir: &Path) -> String {
    let names: Vec<_> = dir
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_string_lossy()),
            _ => None,
        })
        .collect();
    names[names.len().saturating_sub(2)..].join("/")
}

/// Names the models whose answers were used, with the number of answers.
fn teachers(groups: &GroupCounts) -> String {
    /// Maximum number of groups that are named.
    const SHOWN: usize = 8;
    let mut used: Vec<String> = groups
        .all_used()
        .map(|(group, count)| {
            format!(
                "{} ({} answers)",
                group.model_and_sampling(),
                format_count(count)
            )
        })
        .collect();
    let others = used.len().saturating_sub(SHOWN);
    used.truncate(SHOWN);
    if others > 0 {
        used.push(format!("{others} other groups"));
    }
    if used.is_empty() {
        "none; trained on given answers".into()
    } else {
        used.join("; ")
    }
}

/// Returns the model card of a co-trained teacher that was loaded from `dir`.
pub(crate) fn teacher_card(dir: &Path, model: &ModelConfig, tokenizer: &Tokenizer) -> String {
    format!(
        "{}A {} model, trained from {} by `distill train` as the teacher of the student \
         beside it, by cross-entropy on the same answers.\n{}",
        head(model),
        model.model_type(),
        model_name(dir),
        usage(tokenizer)
    )
}
