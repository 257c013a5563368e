//! Good answers, written straight into the bytes of a body. Pure: chance and time are arguments.

use crate::mock::chat::Chat;
use crate::mock::logprobs::{Pieces, write_number, write_string};
use crate::mock::script::Script;
use crate::mock::script::answers::{Text, Token};

/// The bytes of a token of [`Token::Bytes`].
const BYTES: usize = 3;

/// What an answer is billed as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    pub reasoning_tokens: u64,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub body: Vec<u8>,
    pub usage: Usage,
}

/// What an answer needs besides the request.
pub(crate) struct Circumstances<'a> {
    pub script: &'a Script,
    /// Of the script's `top_logprobs`, at temperature 1.
    pub pieces: &'a Pieces,
    /// Names the answer.
    pub id: u128,
    /// Unix time in seconds.
    pub created: i64,
}

/// The answer to `chat`; the same `draw` makes the same one.
pub(crate) fn write(chat: &Chat, with: &Circumstances, draw: &mut fastrand::Rng) -> Answer {
    let answers = &with.script.answers;
    let text = match &answers.text {
        Text::Echo => chat.prompt.as_ref().into(),
        Text::Upper => chat.prompt.to_uppercase().into(),
        Text::Fixed(text) => std::borrow::Cow::Borrowed(text.as_str()),
    };
    let wanted = answers
        .tokens
        .map(|span| span.at(draw.f64()).round() as u64);
    let room = chat
        .max_tokens
        .map(|most| most.saturating_sub(answers.reasoning_tokens));
    let content = Content::compose(&text, answers.token, wanted, room.unwrap_or(u64::MAX));
    let reasoning_tokens = match chat.max_tokens {
        Some(most) => answers.reasoning_tokens.min(most),
        None => answers.reasoning_tokens,
    };
    let usage = Usage {
        prompt_tokens: chat.prompt_tokens,
        cached_tokens: answers.cached_tokens.min(chat.prompt_tokens),
        completion_tokens: (content.ends.len() as u64 + reasoning_tokens) * chat.n,
        reasoning_tokens: reasoning_tokens * chat.n,
    };
    let mut out = Vec::with_capacity(512 + 2 * content.bytes.len());
    write_head(&mut out, chat, with);
    for index in 0..chat.n {
        if index > 0 {
            out.push(b',');
        }
        write_choice(&mut out, index, &content, chat, with, draw);
    }
    out.extend_from_slice(b"],\"usage\":");
    write_usage(&mut out, &usage);
    out.push(b'}');
    Answer { body: out, usage }
}

fn write_head(out: &mut Vec<u8>, chat: &Chat, with: &Circumstances) {
    out.extend_from_slice(b"{\"id\":\"chatcmpl-");
    out.extend_from_slice(&hex(with.id));
    out.extend_from_slice(b"\",\"object\":\"chat.completion\",\"created\":");
    write_number(out, with.created.unsigned_abs());
    out.extend_from_slice(b",\"model\":");
    write_string(out, &chat.model);
    out.extend_from_slice(b",\"system_fingerprint\":\"fp_mock\",\"choices\":[");
}

fn write_choice(
    out: &mut Vec<u8>,
    index: u64,
    content: &Content,
    chat: &Chat,
    with: &Circumstances,
    draw: &mut fastrand::Rng,
) {
    let answers = &with.script.answers;
    out.extend_from_slice(b"{\"index\":");
    write_number(out, index);
    out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",\"content\":");
    write_string(out, &String::from_utf8_lossy(&content.bytes));
    out.extend_from_slice(b",\"refusal\":null},\"logprobs\":");
    match chat.top_logprobs.filter(|_| answers.logprobs) {
        None => out.extend_from_slice(b"null"),
        Some(top) => {
            let tempered = (answers.tempered && chat.temperature != 1.0)
                .then(|| Pieces::new(answers.top_logprobs, chat.temperature));
            let pieces = tempered.as_ref().unwrap_or(with.pieces);
            out.extend_from_slice(b"{\"content\":[");
            let mut start = 0;
            for &end in &content.ends {
                if start > 0 {
                    out.push(b',');
                }
                pieces.write(out, &content.bytes[start..end], top, draw);
                start = end;
            }
            out.extend_from_slice(b"],\"refusal\":null}");
        }
    }
    out.extend_from_slice(b",\"finish_reason\":");
    let finish_reason = match content.cut {
        true => "length",
        false => &answers.finish_reason,
    };
    write_string(out, finish_reason);
    out.push(b'}');
}

fn write_usage(out: &mut Vec<u8>, usage: &Usage) {
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

/// A text in tokens.
#[derive(Debug, PartialEq)]
struct Content {
    bytes: Vec<u8>,
    /// Where each token ends.
    ends: Vec<usize>,
    /// Whether the longest answer's length cut it off.
    cut: bool,
}

impl Content {
    /// `text`, repeated or ended after `wanted` tokens, and in any case after `room` of them.
    fn compose(text: &str, token: Token, wanted: Option<u64>, room: u64) -> Content {
        let mut content = Content {
            bytes: Vec::with_capacity(text.len()),
            ends: Vec::new(),
            cut: wanted.is_some_and(|wanted| wanted > room),
        };
        let most = wanted.map_or(room, |wanted| wanted.min(room));
        let mut rest = text.as_bytes();
        while (content.ends.len() as u64) < most {
            if rest.is_empty() {
                if wanted.is_none() || text.is_empty() {
                    return content;
                }
                rest = text.as_bytes();
                // So that the last word and the first one stay two.
                if token == Token::Word && !rest[0].is_ascii_whitespace() {
                    content.bytes.push(b' ');
                }
            }
            let (first, others) = rest.split_at(token_len(rest, token));
            content.bytes.extend_from_slice(first);
            content.ends.push(content.bytes.len());
            rest = others;
        }
        content.cut |= wanted.is_none() && !rest.is_empty();
        content
    }
}

/// The length in bytes of the first token of `text`, which is not empty.
fn token_len(text: &[u8], token: Token) -> usize {
    match token {
        Token::Word => {
            let is_space = |byte: &u8| byte.is_ascii_whitespace();
            let start = text.iter().position(|byte| !is_space(byte));
            let start = start.unwrap_or(text.len());
            let word = text[start..].iter().position(is_space);
            word.map_or(text.len(), |length| start + length)
        }
        Token::Char => {
            let next = text[1..].iter().position(|byte| byte & 0xc0 != 0x80);
            next.map_or(text.len(), |next| next + 1)
        }
        Token::Bytes => BYTES.min(text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, token: Token, wanted: Option<u64>, room: u64, tokens: &[&str], cut: bool) {
        let content = Content::compose(text, token, wanted, room);
        let mut start = 0;
        let found: Vec<_> = content
            .ends
            .iter()
            .map(|&end| {
                String::from_utf8_lossy(&content.bytes[std::mem::replace(&mut start, end)..end])
            })
            .collect();
        assert_eq!(found, tokens);
        assert_eq!(content.cut, cut);
        assert_eq!(start, content.bytes.len());
    }

    #[test]
    fn a_text_is_repeated_or_cut_to_its_tokens() {
        let many = u64::MAX;
        check(
            "a b  c ",
            Token::Word,
            None,
            many,
            &["a", " b", "  c", " "],
            false,
        );
        check("a b", Token::Word, Some(3), many, &["a", " b", " a"], false);
        check("a b", Token::Word, Some(3), 2, &["a", " b"], true);
        check("a b", Token::Word, None, 1, &["a"], true);
        check("a b", Token::Word, None, 2, &["a", " b"], false);
        check("aä日", Token::Char, None, many, &["a", "ä", "日"], false);
        check(
            "ää",
            Token::Bytes,
            None,
            many,
            &["ä\u{fffd}", "\u{fffd}"],
            false,
        );
        check("", Token::Word, Some(3), many, &[], false);
        check("a", Token::Word, None, 0, &[], true);
    }
}
