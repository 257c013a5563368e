//! The routes, and what their handlers share.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::engine::Job;
use super::error::ApiError;
use super::wire::Head;
use super::{chat, completions};
use crate::tokenizer::Tokenizer;

/// Larger bodies are refused with 413.
const MAX_BODY_BYTES: usize = 16 << 20;

/// What the handlers share.
pub struct App {
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
    pub fn check_model(&self, asked: &str) -> Result<(), ApiError> {
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
    pub fn check_length(
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
    pub fn head(&self, object: &'static str) -> Head {
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

    fn card(&self) -> Value {
        json!({
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "distill",
            "max_model_len": self.context,
        })
    }
}

pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*model}", get(show_model))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(Arc::new(app))
}

async fn list_models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [app.card()]}))
}

/// The name may hold slashes, as names on the hub do.
async fn show_model(
    State(app): State<Arc<App>>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(&model)?;
    Ok(Json(app.card()))
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    let message = format!("there is no {method} {}", uri.path());
    ApiError::http(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::http(StatusCode::METHOD_NOT_ALLOWED, message)
}
