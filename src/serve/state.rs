//! State shared by the request handlers.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::serve::engine::EngineJob;
use crate::serve::error::ErrorResponse;
use crate::serve::wire::ResponseHead;
use crate::tokenizer::Tokenizer;

/// The properties of the served model that handlers need, and the queue of its engine.
pub(crate) struct AppState {
    /// Model name that requests must use.
    pub model: String,
    /// Hash of the model's config and weights.
    pub fingerprint: String,
    /// Start of the server, as Unix time in seconds.
    pub started: i64,
    /// The model's context length in tokens.
    pub context: usize,
    /// Number of valid token ids, which have both a token and an embedding.
    pub vocab_size: usize,
    pub tokenizer: Arc<Tokenizer>,
    pub jobs: mpsc::Sender<EngineJob>,
}

impl AppState {
    /// Checks the model name of a request.
    ///
    /// # Errors
    /// 404 if it is not the served model.
    pub(crate) fn check_model(&self, requested: &str) -> Result<(), ErrorResponse> {
        if requested == self.model {
            Ok(())
        } else {
            Err(ErrorResponse::model_not_found(requested, &self.model))
        }
    }

    /// Checks that a prompt of `tokens` tokens fits the context. If `is_answered` is true, the context of a decoder must
    /// have room for one more token.
    ///
    /// # Errors
    /// 400 that names `field`.
    pub(crate) fn check_length(
        &self,
        field: &'static str,
        tokens: usize,
        is_answered: bool,
    ) -> Result<(), ErrorResponse> {
        let shares_context = is_answered && !self.tokenizer.is_encoder_decoder();
        if tokens + usize::from(shares_context) > self.context {
            return Err(ErrorResponse::context_length_exceeded(
                field,
                tokens,
                self.context,
            ));
        }
        Ok(())
    }

    /// Checks that the model can repeat or score a prompt, if `field` of the request needs it.
    ///
    /// # Errors
    /// 400 that names `field`, for an encoder-decoder.
    pub(crate) fn check_scores_prompts(
        &self,
        field: &'static str,
        is_needed: bool,
    ) -> Result<(), ErrorResponse> {
        if is_needed && self.tokenizer.is_encoder_decoder() {
            let message = format!(
                "`{field}` is not possible with this model, an encoder-decoder, which reads the prompt without predicting \
                 it: omit `{field}`; to score answers of a student with this model as its teacher, set `teacher.local` to \
                 its folder"
            );
            return Err(ErrorResponse::bad_field(field, message));
        }
        Ok(())
    }

    /// Creates the fields that all objects of one response share, with a new id.
    pub(crate) fn head(&self, object: &'static str) -> ResponseHead {
        let prefix = if object.starts_with("chat") {
            "chatcmpl"
        } else {
            "cmpl"
        };
        ResponseHead {
            id: format!("{prefix}-{:032x}", fastrand::u128(..)),
            object,
            created: jiff::Timestamp::now().as_second(),
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
        }
    }

    /// Returns the entry of `/v1/models`.
    pub(crate) fn model_json(&self) -> Value {
        json!({
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "distill",
            "max_model_len": self.context,
        })
    }
}
