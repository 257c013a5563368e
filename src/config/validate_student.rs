//! Checks of the settings of a student.

use super::check::check;
use super::error::Mistake;
use super::student::{StudentConfig, StudentInit, StudentType};

/// Checks the settings of a student.
///
/// # Errors
/// The first mistake.
pub(super) fn validate_student(student: &StudentConfig) -> Result<(), Mistake> {
    let keeps_layers = student.encoder_layers.is_some() || student.decoder_layers.is_some();
    check(
        student.init == StudentInit::Layers || !keeps_layers,
        "student.init",
        "must be \"layers\" if `student.encoder_layers` or `student.decoder_layers` is set",
    )?;
    check(
        student.rope_theta.is_finite() && student.rope_theta > 0.0,
        "student.rope_theta",
        "must be finite and above 0",
    )?;
    validate_shape(student)?;
    check(
        student.init != StudentInit::Random
            || (student.num_attention_heads > 0
                && student
                    .hidden_size
                    .is_multiple_of(student.num_attention_heads)),
        "student.hidden_size",
        "must be a multiple of `student.num_attention_heads`",
    )
}

/// Keys of a shape that only a llama has.
const LLAMA_KEYS: [&str; 3] = [
    "student.num_key_value_heads",
    "student.rope_theta",
    "student.max_position_embeddings",
];

/// Checks that a shape is set only for a student with random weights, and has only settings of its architecture.
fn validate_shape(student: &StudentConfig) -> Result<(), Mistake> {
    let is_random = student.init == StudentInit::Random;
    let is_llama = student.model_type == StudentType::Llama;
    for key in shape_keys(student) {
        check(
            is_random,
            key,
            "is for a student with random weights (`student.init = \"random\"`): the model in `student.path` has its own \
             shape, of which `student.decoder_layers` keeps some layers; remove it",
        )?;
        check(
            !is_llama || key != "student.num_encoder_layers",
            key,
            "is for `student.model_type = \"t5\"`: a llama has no encoder",
        )?;
        check(
            is_llama || !LLAMA_KEYS.contains(&key),
            key,
            "is for a llama: a t5 has as many key/value heads as heads, and relative positions; remove it",
        )?;
    }
    Ok(())
}

/// Returns the keys of a shape that are set to other values than the default.
fn shape_keys(student: &StudentConfig) -> impl Iterator<Item = &'static str> {
    let default = StudentConfig::default();
    macro_rules! keys {
        ($($field:ident),*) => {
            [$((concat!("student.", stringify!($field)), student.$field != default.$field)),*]
        };
    }
    let keys = keys!(
        model_type,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_encoder_layers,
        num_attention_heads,
        num_key_value_heads,
        tie_word_embeddings,
        rope_theta,
        max_position_embeddings
    );
    keys.into_iter()
        .filter_map(|(key, is_set)| is_set.then_some(key))
}
