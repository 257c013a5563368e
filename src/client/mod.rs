//! The client of a teacher's HTTP API: sends requests, reads replies, classifies failures.
//!
//! | file | content |
//! |---|---|
//! | `transport` | traits [`transport::Transport`] and [`transport::BatchApi`]; raw replies; transport errors |
//! | `http`, `http_batches`, `sender` | implementation of both traits over HTTP |
//! | `connection`, `credentials`, `secrets` | base URL and TLS; API key and headers; removal of keys from replies |
//! | `request`, `structured_output` | request bodies; JSON schema of the answers |
//! | `response` | lenient parser of replies |
//! | `score_text` | logprobs of a text that the teacher did not write |
//! | `batch_object` | batch objects, pages of batches, lines of result files |
//! | `outcome`, `refusal_reason`, `retry_after` | classification of replies and of error replies; requested waits |
//! | `attempt_error`, `refused` | errors of one attempt; error messages, with advice, of a run that stops |
//!
//! Invariants:
//! - One call sends one request. Retries, rate limits and the budget belong to the callers.
//! - A paid answer is never discarded because of a malformed field.
//! - The API key is exposed in one expression and removed from every reply before the reply is parsed, shown or stored.
//! - The parsers and classifiers are pure: time is an argument.

pub(crate) mod attempt_error;
pub(crate) mod batch_object;
pub(crate) mod connection;
pub(crate) mod credentials;
pub(crate) mod http;
pub(crate) mod http_batches;
pub(crate) mod outcome;
pub(crate) mod refusal_reason;
pub(crate) mod refused;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod retry_after;
pub(crate) mod score_text;
pub(crate) mod secrets;
pub(crate) mod sender;
pub(crate) mod structured_output;
pub mod transport;
