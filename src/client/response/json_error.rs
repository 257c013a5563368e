//! [`JsonProblem`]: the reason why a body contains no JSON value.

/// Reason why a body contains no JSON value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JsonProblem {
    Empty,
    /// The body ends within the value.
    CutOff,
    /// The reason, or the text that was found instead of JSON.
    NotJson(String),
}

impl std::fmt::Display for JsonProblem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            JsonProblem::Empty => formatter.write_str("the body is empty"),
            JsonProblem::CutOff => formatter.write_str("the JSON ends early (EOF)"),
            JsonProblem::NotJson(text) => write!(formatter, "not JSON: {text}"),
        }
    }
}

/// Returns the first characters of a body, for messages.
pub(crate) fn beginning(body: &[u8]) -> String {
    const MAX_CHARS: usize = 120;
    let body = body.trim_ascii();
    // A character has at most 4 bytes in UTF-8.
    let part = &body[..body.len().min(4 * MAX_CHARS)];
    let text = String::from_utf8_lossy(part);
    let mut short: String = text.chars().take(MAX_CHARS).collect();
    if part.len() < body.len() || short.len() < text.len() {
        short.push_str(" ...");
    }
    short
}
