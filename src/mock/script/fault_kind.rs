//! The kinds of faults, and their names in a script.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::error::nearest;

/// The kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum FaultKind {
    /// `http 500`: an error with this status, in OpenAI's shape.
    Http(u16),
    /// `html 502`: an HTML page, as proxies send.
    Html(u16),
    /// A 429 that persists however long the client waits.
    InsufficientQuota,
    /// A redirect to another host, unless `headers.location` is set.
    Redirect,
    /// Connection refused. Over TCP a reset, since the connection is already accepted.
    Refused,
    /// A reset before the first byte of the reply.
    Reset,
    /// No reply; the connection stays open.
    Stall,
    /// An error body with status 200.
    ErrorIn200,
    /// Half of the answer, then a reset.
    ResetInBody,
    /// Half of the announced body, then a regular close.
    ShortBody,
    /// A chunked body without its last chunk.
    UnfinishedChunks,
    /// Half of the answer; the connection stays open.
    StallInBody,
    /// The answer byte by byte, one every `interval_s`.
    Drip,
    /// Blank lines before the answer, one every `interval_s`.
    BlankLines,
    /// An empty body.
    Empty,
    /// Half of the body, with a matching content length.
    Truncated,
    BadUtf8,
    NoChoices,
    NullContent,
    UnknownFinishReason,
    FloatCreated,
    /// `logprobs` is null although requested.
    LogprobsNull,
    /// Fewer positions than tokens, and fewer alternatives than requested.
    LogprobsFewer,
    /// Bare `NaN`, as Python writes it.
    LogprobsNan,
    /// Bare `-Infinity`.
    LogprobsInf,
    /// -9999.0, OpenAI's "very unlikely".
    LogprobsSentinel,
    /// The first alternative is repeated.
    LogprobsDuplicates,
    /// The chosen token is not among the alternatives.
    LogprobsWithoutChosen,
    /// A body of `size` bytes, by default 64 MiB.
    HugeBody,
    /// Nested arrays of depth `size`, by default 100,000.
    DeepJson,
    OtherModel,
    NoUsage,
    /// A `refusal` instead of the content.
    LimitRefusal,
    ContentFilter,
    /// An answer cut off at `max_tokens`.
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
    ("refusal", FaultKind::LimitRefusal),
    ("content_filter", FaultKind::ContentFilter),
    ("length", FaultKind::Length),
];

impl FaultKind {
    /// All kinds; of those with a status, one example each.
    pub fn all() -> impl Iterator<Item = FaultKind> {
        let named = NAMES.into_iter().map(|(_, kind)| kind);
        [FaultKind::Http(500), FaultKind::Html(502)]
            .into_iter()
            .chain(named)
    }

    /// Whether the fault corrupts an answer. Such a request is billed by default.
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
                .ok_or_else(|| format!("{name:?} must have a status from 200 to 599"))
        };
        if let Some(rest) = name.strip_prefix("http ") {
            return status(rest).map(FaultKind::Http);
        }
        if let Some(rest) = name.strip_prefix("html ") {
            return status(rest).map(FaultKind::Html);
        }
        let known = NAMES.iter().find(|(other, _)| *other == name);
        known.map(|(_, kind)| *kind).ok_or_else(|| {
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
