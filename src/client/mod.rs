//! TODO

pub(crate) mod attempt_error;
pub(crate) mod batch_object;
pub(crate) mod connection;
pub(crate) mod credentials;
pub(crate) mod http;
pub(crate) mod http_batches;
pub(crate) mod one_attempt;
pub(crate) mod outcome;
pub(crate) mod refusal_reason;
pub(crate) mod refused;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod retry_after;
pub(crate) mod score_text;
pub(crate) mod secrets;
pub(crate) mod structured_output;
pub mod transport;
