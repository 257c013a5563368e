//! The routes of the server.

use crate::serve::state::AppState;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::error::ErrorResponse;
use super::{chat, completions};

/// Maximum size of a request body. A larger one is rejected with 413.
const MAX_BODY_BYTES: usize = 16 << 20;

/// Builds the routes, which share the state `app`.
pub(crate) fn router(app: AppState) -> Router {
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

async fn list_models(State(app): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [app.model_json()]}))
}

/// Handles `/v1/models/{model}`. The model's name may contain slashes, as names on the Hugging Face Hub do.
async fn show_model(
    State(app): State<Arc<AppState>>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    app.check_model(&model)?;
    Ok(Json(app.model_json()))
}

async fn unknown_route(method: Method, uri: Uri) -> ErrorResponse {
    let message = format!("unknown route: {method} {}", uri.path());
    ErrorResponse::http(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method, uri: Uri) -> ErrorResponse {
    let message = format!("{} does not support {method}", uri.path());
    ErrorResponse::http(StatusCode::METHOD_NOT_ALLOWED, message)
}
