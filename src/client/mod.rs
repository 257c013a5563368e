//! TODO

pub mod batch_object;
pub mod connection;
pub mod credentials;
pub mod error_class;
pub mod http;
pub mod http_batches;
pub mod one_attempt;
pub mod outcome;
pub mod request;
pub mod response;
pub mod retry_after;
pub mod score_text;
pub mod secrets;
pub mod structured_output;
