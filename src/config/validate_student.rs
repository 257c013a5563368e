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

/// Checks that a shape is set only for a student with random weights, and has only settings of its architecture.
fn validate_shape(student: &StudentConfig) -> Result<(), Mistake> {
    if student.init != StudentInit::Random {
        return validate_without_shape(student);
    }
    let is_llama = student.model_type == StudentType::Llama;
    check(
        !is_llama || student.num_encoder_layers.is_none(),
        "student.num_encoder_layers",
        "is for `student.model_type = \"t5\"`: a llama has no encoder",
    )?;
    let default = StudentConfig::default();
    for (key, is_default) in [
        (
            "student.num_key_value_heads",
            student.num_key_value_heads == default.num_key_value_heads,
        ),
        (
            "student.rope_theta",
            student.rope_theta == default.rope_theta,
        ),
        (
            "student.max_position_embeddings",
            student.max_position_embeddings == default.max_position_embeddings,
        ),
    ] {
        check(
            is_llama || is_default,
            key,
            "is for a llama: a t5 has as many key/value heads as heads, and relative positions; remove it",
        )?;
    }
    Ok(())
}

/// Checks that no shape is set for a student whose weights are those of `student.path`.
fn validate_without_shape(student: &StudentConfig) -> Result<(), Mistake> {
    macro_rules! check_unset {
        ($($field:ident),*) => {
            $(check(
                student.$field == StudentConfig::default().$field,
                concat!("student.", stringify!($field)),
                "is for a student with random weights (`student.init = \"random\"`): the model in `student.path` has its own \
                 shape, of which `student.decoder_layers` keeps some layers; remove it",
            )?;)*
        };
    }
    check_unset!(
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
    Ok(())
}
