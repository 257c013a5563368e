//! TODO

use crate::serve::engine::Job;
use crate::serve::error::ApiError;
use crate::serve::wire::Head;
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use serde_json::json;
use std::sync::Arc;
use tokio::sync::mpsc;

/// What the handlers share.
pub(crate) struct App {
    /// The name that requests must ask for.
    pub model: String,
    pub fingerprint: String,
    /// Unix time in seconds.
    pub started: i64,
    /// The model's context length in tokens.
    pub context: usize,
    /// Ids from here on are no tokens, or have no embedding.
    pub tokens: usize,
    pub tokenizer: Arc<Tokenizer>,
    pub jobs: mpsc::Sender<Job>,
}

impl App {
    /// # Errors
    ///
    /// 404 where another model is asked for.
    pub(crate) fn check_model(&self, asked: &str) -> Result<(), ApiError> {
        if asked == self.model {
            Ok(())
        } else {
            Err(ApiError::model_not_found(asked, &self.model))
        }
    }

    /// # Errors
    ///
    /// 400 where a prompt of so many tokens, in `field`, does not fit the model; with an answer to come
    /// it must leave room for one more.
    pub(crate) fn check_length(
        &self,
        field: &'static str,
        tokens: usize,
        is_answered: bool,
    ) -> Result<(), ApiError> {
        match tokens + usize::from(is_answered) > self.context {
            true => Err(ApiError::context_length_exceeded(
                field,
                tokens,
                self.context,
            )),
            false => Ok(()),
        }
    }

    /// The fields that every object of a new answer repeats.
    pub(crate) fn head(&self, object: &'static str) -> Head {
        Head {
            id: match object.starts_with("chat") {
                true => format!("chatcmpl-{:032x}", fastrand::u128(..)),
                false => format!("cmpl-{:032x}", fastrand::u128(..)),
            },
            object,
            created: jiff::Timestamp::now().as_second(),
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
        }
    }

    pub(crate) fn card(&self) -> Value {
        json!({
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "distill",
            "max_model_len": self.context,
        })
    }
}
