//! Writes valid answers as JSON bytes. Pure: random numbers and time are arguments.

use crate::mock::chat::ParsedChat;
use crate::mock::logprobs::{LogprobTemplates, write_number, write_string};
use crate::mock::script::Script;
use crate::mock::script::answers::{AnswerText, TokenUnit};

/// Length in bytes of a token of [`TokenUnit::Bytes`].
const BYTES_PER_TOKEN: usize = 3;

/// The tokens that are billed for an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MockUsage {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    pub reasoning_tokens: u64,
}

/// An answer: the body of its reply and its usage.
#[derive(Debug)]
pub(crate) struct MockAnswer {
    pub body: Vec<u8>,
    pub usage: MockUsage,
}

/// The inputs of an answer besides the request.
pub(crate) struct AnswerInputs<'a> {
    pub script: &'a Script,
    /// Templates for the script's `top_logprobs` at temperature 1.
    pub templates: &'a LogprobTemplates,
    /// Last part of the answer's id.
    pub id: u128,
    /// Unix time in seconds.
    pub created: i64,
}

/// Writes the answer to `chat`. The same `rng` state gives the same answer.
pub(crate) fn write(
    chat: &ParsedChat,
    inputs: &AnswerInputs,
    rng: &mut fastrand::Rng,
) -> MockAnswer {
    let answers = &inputs.script.answers;
    let text = match &answers.text {
        AnswerText::Echo => chat.prompt.as_ref().into(),
        AnswerText::Upper => chat.prompt.to_uppercase().into(),
        AnswerText::Fixed(text) => std::borrow::Cow::Borrowed(text.as_str()),
    };
    let token_count = answers
        .tokens
        .map(|range| range.sample(rng.f64()).round() as u64);
    let max_tokens = chat
        .max_tokens
        .map(|limit| limit.saturating_sub(answers.reasoning_tokens));
    let content = AnswerContent::from_text(
        &text,
        answers.token,
        token_count,
        max_tokens.unwrap_or(u64::MAX),
    );
    let reasoning_tokens = match chat.max_tokens {
        Some(limit) => answers.reasoning_tokens.min(limit),
        None => answers.reasoning_tokens,
    };
    let usage = MockUsage {
        prompt_tokens: chat.prompt_tokens,
        cached_tokens: answers.cached_tokens.min(chat.prompt_tokens),
        completion_tokens: (content.ends.len() as u64 + reasoning_tokens) * chat.n,
        reasoning_tokens: reasoning_tokens * chat.n,
    };
    let mut out = Vec::with_capacity(512 + 2 * content.bytes.len());
    write_head(&mut out, chat, inputs);
    for index in 0..chat.n {
        if index > 0 {
            out.push(b',');
        }
        write_choice(&mut out, index, &content, chat, inputs, rng);
    }
    out.extend_from_slice(b"],\"usage\":");
    write_usage(&mut out, &usage);
    out.push(b'}');
    MockAnswer { body: out, usage }
}

fn write_head(out: &mut Vec<u8>, chat: &ParsedChat, inputs: &AnswerInputs) {
    out.extend_from_slice(b"{\"id\":\"chatcmpl-");
    out.extend_from_slice(&hex(inputs.id));
    out.extend_from_slice(b"\",\"object\":\"chat.completion\",\"created\":");
    write_number(out, inputs.created.unsigned_abs());
    out.extend_from_slice(b",\"model\":");
    write_string(out, &chat.model);
    out.extend_from_slice(b",\"system_fingerprint\":\"fp_mock\",\"choices\":[");
}

fn write_choice(
    out: &mut Vec<u8>,
    index: u64,
    content: &AnswerContent,
    chat: &ParsedChat,
    inputs: &AnswerInputs,
    rng: &mut fastrand::Rng,
) {
    let answers = &inputs.script.answers;
    out.extend_from_slice(b"{\"index\":");
    write_number(out, index);
    out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",\"content\":");
    write_string(out, &String::from_utf8_lossy(&content.bytes));
    out.extend_from_slice(b",\"refusal\":null},\"logprobs\":");
    match chat.top_logprobs.filter(|_| answers.logprobs) {
        None => out.extend_from_slice(b"null"),
        Some(top_logprobs) => {
            let tempered = (answers.tempered && chat.temperature != 1.0)
                .then(|| LogprobTemplates::new(answers.top_logprobs, chat.temperature));
            let templates = tempered.as_ref().unwrap_or(inputs.templates);
            out.extend_from_slice(b"{\"content\":[");
            let mut start = 0;
            for &end in &content.ends {
                if start > 0 {
                    out.push(b',');
                }
                templates.write(out, &content.bytes[start..end], top_logprobs, rng);
                start = end;
            }
            out.extend_from_slice(b"],\"refusal\":null}");
        }
    }
    out.extend_from_slice(b",\"finish_reason\":");
    let finish_reason = if content.is_truncated {
        "length"
    } else {
        &answers.finish_reason
    };
    write_string(out, finish_reason);
    out.push(b'}');
}

fn write_usage(out: &mut Vec<u8>, usage: &MockUsage) {
    let fields: [(&[u8], u64); 5] = [
        (b"{\"prompt_tokens\":", usage.prompt_tokens),
        (b",\"completion_tokens\":", usage.completion_tokens),
        (
            b",\"total_tokens\":",
            usage.prompt_tokens + usage.completion_tokens,
        ),
        (
            b",\"prompt_tokens_details\":{\"cached_tokens\":",
            usage.cached_tokens,
        ),
        (
            b"},\"completion_tokens_details\":{\"reasoning_tokens\":",
            usage.reasoning_tokens,
        ),
    ];
    for (name, count) in fields {
        out.extend_from_slice(name);
        write_number(out, count);
    }
    out.extend_from_slice(b"}}");
}

fn hex(number: u128) -> [u8; 32] {
    let mut digits = [0; 32];
    for (index, digit) in digits.iter_mut().enumerate() {
        let nibble = (number >> (124 - 4 * index)) as usize & 15;
        *digit = b"0123456789abcdef"[nibble];
    }
    digits
}

/// The content of an answer, split into tokens.
#[derive(Debug, PartialEq)]
struct AnswerContent {
    bytes: Vec<u8>,
    /// End offset of each token.
    ends: Vec<usize>,
    /// True if `max_tokens` cut the content off.
    is_truncated: bool,
}

impl AnswerContent {
    /// Splits `text` into tokens, repeats or cuts it to `token_count` tokens, and cuts it to `max_tokens`.
    fn from_text(
        text: &str,
        token: TokenUnit,
        token_count: Option<u64>,
        max_tokens: u64,
    ) -> AnswerContent {
        let mut content = AnswerContent {
            bytes: Vec::with_capacity(text.len()),
            ends: Vec::new(),
            is_truncated: token_count.is_some_and(|count| count > max_tokens),
        };
        let limit = token_count.map_or(max_tokens, |count| count.min(max_tokens));
        let mut remaining = text.as_bytes();
        while (content.ends.len() as u64) < limit {
            if remaining.is_empty() {
                if token_count.is_none() || text.is_empty() {
                    return content;
                }
                remaining = text.as_bytes();
                // A space separates the last word from the first word of the repetition.
                if token == TokenUnit::Word && !remaining[0].is_ascii_whitespace() {
                    content.bytes.push(b' ');
                }
            }
            let (first, next) = remaining.split_at(token_len(remaining, token));
            content.bytes.extend_from_slice(first);
            content.ends.push(content.bytes.len());
            remaining = next;
        }
        content.is_truncated |= token_count.is_none() && !remaining.is_empty();
        content
    }
}

/// Returns the length in bytes of the first token of `text`, which must not be empty.
fn token_len(text: &[u8], token: TokenUnit) -> usize {
    match token {
        TokenUnit::Word => {
            let is_space = |byte: &u8| byte.is_ascii_whitespace();
            let start = text.iter().position(|byte| !is_space(byte));
            let start = start.unwrap_or(text.len());
            let word = text[start..].iter().position(is_space);
            word.map_or(text.len(), |length| start + length)
        }
        TokenUnit::Char => {
            let next = text[1..].iter().position(|byte| byte & 0xc0 != 0x80);
            next.map_or(text.len(), |next| next + 1)
        }
        TokenUnit::Bytes => BYTES_PER_TOKEN.min(text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        text: &str,
        token: TokenUnit,
        token_count: Option<u64>,
        max_tokens: u64,
        tokens: &[&str],
        is_truncated: bool,
    ) {
        let content = AnswerContent::from_text(text, token, token_count, max_tokens);
        let mut start = 0;
        let split_tokens: Vec<_> = content
            .ends
            .iter()
            .map(|&end| {
                String::from_utf8_lossy(&content.bytes[std::mem::replace(&mut start, end)..end])
            })
            .collect();
        assert_eq!(split_tokens, tokens);
        assert_eq!(content.is_truncated, is_truncated);
        assert_eq!(start, content.bytes.len());
    }

    #[test]
    fn text_is_repeated_or_cut_to_the_token_count() {
        let unlimited = u64::MAX;
        check(
            "a b  c ",
            TokenUnit::Word,
            None,
            unlimited,
            &["a", " b", "  c", " "],
            false,
        );
        check(
            "a b",
            TokenUnit::Word,
            Some(3),
            unlimited,
            &["a", " b", " a"],
            false,
        );
        check("a b", TokenUnit::Word, Some(3), 2, &["a", " b"], true);
        check("a b", TokenUnit::Word, None, 1, &["a"], true);
        check("a b", TokenUnit::Word, None, 2, &["a", " b"], false);
        check(
            "aä日",
            TokenUnit::Char,
            None,
            unlimited,
            &["a", "ä", "日"],
            false,
        );
        check(
            "ää",
            TokenUnit::Bytes,
            None,
            unlimited,
            &["ä\u{fffd}", "\u{fffd}"],
            false,
        );
        check("", TokenUnit::Word, Some(3), unlimited, &[], false);
        check("a", TokenUnit::Word, None, 0, &[], true);
    }
}
