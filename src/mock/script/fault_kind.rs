//! [`FaultKind`]: the kinds of faults, and their names in a script.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::error::nearest;

/// The way in which a fault replaces or corrupts a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum FaultKind {
    /// `http 500`: an error with this status, in OpenAI's format.
    Http(u16),
    /// `html 502`: an HTML page, as proxies send.
    Html(u16),
    /// A 429 with the code `insufficient_quota`, after which retries are useless.
    InsufficientQuota,
    /// A 307 redirect to a host that does not exist, or to `headers.location`.
    Redirect,
    /// A refused connection. Over TCP a reset, because the mock has already accepted the connection.
    Refused,
    /// A reset before the first byte of the reply.
    Reset,
    /// No reply; the connection stays open.
    Stall,
    /// An error body with status 200.
    ErrorIn200,
    /// Half of the answer, then a reset.
    ResetInBody,
    /// Half of the body that the content length announces, then a regular close.
    ShortBody,
    /// A chunked body without its last chunk.
    UnfinishedChunks,
    /// Half of the answer; the connection stays open.
    StallInBody,
    /// The answer byte by byte, one every `interval_s`.
    Drip,
    /// Blank lines before the answer: one every `interval_s` if that is set, otherwise all at once.
    BlankLines,
    /// An empty body.
    Empty,
    /// Half of the body, with a matching content length.
    Truncated,
    /// Content that is not valid UTF-8.
    BadUtf8,
    /// An empty list of `choices`.
    NoChoices,
    /// A `content` that is null.
    NullContent,
    /// A `finish_reason` that OpenAI's API does not define.
    UnknownFinishReason,
    /// A `created` with a fraction.
    FloatCreated,
    /// `logprobs` is null although the request asks for logprobs.
    LogprobsNull,
    /// Only half of the tokens have logprobs, each with half of the requested alternatives.
    LogprobsFewer,
    /// The logprob of the least likely alternative is `NaN` without quotes, as Python writes it.
    LogprobsNan,
    /// The logprob of the least likely alternative is `-Infinity` without quotes.
    LogprobsInf,
    /// The logprob of the least likely alternative is -9999.0, which OpenAI sends for very unlikely tokens.
    LogprobsSentinel,
    /// The first alternative is repeated.
    LogprobsDuplicates,
    /// The chosen token is not among the alternatives.
    LogprobsWithoutChosen,
    /// A body of `size` bytes, by default 64 MiB.
    HugeBody,
    /// Nested arrays of depth `size`, by default 100,000.
    DeepJson,
    /// A `model` other than the requested one.
    OtherModel,
    /// No `usage`.
    NoUsage,
    /// A `refusal` instead of the content.
    Refusal,
    /// Empty content with the `finish_reason` `content_filter`.
    ContentFilter,
    /// The `finish_reason` `length`, as of an answer that was cut off at `max_tokens`.
    Length,
}

const NAMES: [(&str, FaultKind); 33] = [
    ("insufficient_quota", FaultKind::InsufficientQuota),
    ("redirect", FaultKind::Redirect),
    ("refused", FaultKind::Refused),
    ("reset", FaultKind::Reset),
    ("stall", FaultKind::Stall),
    ("error in 200", FaultKind::ErrorIn200),
    ("reset in body", FaultKind::ResetInBody),
    ("short body", FaultKind::ShortBody),
    ("unfinished chunks", FaultKind::UnfinishedChunks),
    ("stall in body", FaultKind::StallInBody),
    ("drip", FaultKind::Drip),
    ("blank lines", FaultKind::BlankLines),
    ("empty", FaultKind::Empty),
    ("truncated", FaultKind::Truncated),
    ("bad utf-8", FaultKind::BadUtf8),
    ("no choices", FaultKind::NoChoices),
    ("null content", FaultKind::NullContent),
    ("unknown finish_reason", FaultKind::UnknownFinishReason),
    ("float created", FaultKind::FloatCreated),
    ("logprobs null", FaultKind::LogprobsNull),
    ("logprobs fewer", FaultKind::LogprobsFewer),
    ("logprobs nan", FaultKind::LogprobsNan),
    ("logprobs inf", FaultKind::LogprobsInf),
    ("logprobs sentinel", FaultKind::LogprobsSentinel),
    ("logprobs duplicates", FaultKind::LogprobsDuplicates),
    ("logprobs without chosen", FaultKind::LogprobsWithoutChosen),
    ("huge body", FaultKind::HugeBody),
    ("deep json", FaultKind::DeepJson),
    ("other model", FaultKind::OtherModel),
    ("no usage", FaultKind::NoUsage),
    ("refusal", FaultKind::Refusal),
    ("content_filter", FaultKind::ContentFilter),
    ("length", FaultKind::Length),
];

impl FaultKind {
    /// Returns every kind, `Http` and `Html` with one status each.
    pub fn all() -> impl Iterator<Item = FaultKind> {
        let named = NAMES.into_iter().map(|(_, kind)| kind);
        [FaultKind::Http(500), FaultKind::Html(502)]
            .into_iter()
            .chain(named)
    }

    /// Returns true if the fault changes a valid answer, and false if it replaces the answer by an error. Only requests
    /// with an answer are billed by default.
    pub fn corrupts_answer(self) -> bool {
        !matches!(
            self,
            FaultKind::Http(_)
                | FaultKind::Html(_)
                | FaultKind::InsufficientQuota
                | FaultKind::Redirect
                | FaultKind::Refused
                | FaultKind::Reset
                | FaultKind::Stall
                | FaultKind::ErrorIn200
        )
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FaultKind::Http(status) => write!(f, "http {status}"),
            FaultKind::Html(status) => write!(f, "html {status}"),
            kind => f.write_str(
                NAMES
                    .iter()
                    .find(|(_, other)| other == kind)
                    .map_or("", |(name, _)| name),
            ),
        }
    }
}

impl From<FaultKind> for String {
    fn from(kind: FaultKind) -> String {
        kind.to_string()
    }
}

impl TryFrom<String> for FaultKind {
    type Error = String;

    fn try_from(name: String) -> Result<FaultKind, String> {
        let status = |text: &str| {
            text.parse()
                .ok()
                .filter(|status| (200..600).contains(status))
                .ok_or_else(|| format!("{name:?} must contain a status from 200 to 599"))
        };
        if let Some(text) = name.strip_prefix("http ") {
            return status(text).map(FaultKind::Http);
        }
        if let Some(text) = name.strip_prefix("html ") {
            return status(text).map(FaultKind::Html);
        }
        let entry = NAMES.iter().find(|(other, _)| *other == name);
        entry.map(|(_, kind)| *kind).ok_or_else(|| {
            let names = NAMES.iter().map(|(name, _)| *name);
            format!(
                "unknown kind {name:?}{}",
                nearest(
                    &name,
                    names.chain(["http 500", "html 502"]),
                    crate::mock::script::values::KEYS_HINT
                )
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_round_trips_through_its_name() {
        for kind in FaultKind::all() {
            let name = kind.to_string();
            assert!(!name.is_empty(), "{kind:?} has no name");
            assert_eq!(FaultKind::try_from(name), Ok(kind));
        }
        let error = FaultKind::try_from("reset in boddy".to_string()).unwrap_err();
        assert!(error.contains("did you mean \"reset in body\"?"), "{error}");
        assert!(FaultKind::try_from("http 600".to_string()).is_err());
    }
}
