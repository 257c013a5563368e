//! [`QuestionTemplate`]: hashes requests that differ only in their messages.

use serde::Serialize;
use serde_json::Value;

use super::{
    HASH_PREFIX, IGNORED_FIELDS, Question, TEXT_CAPACITY, write_fields, write_ignored, write_scalar,
};
use crate::prompt::message::Message;

const MESSAGES: &str = "messages";

/// Serialised request without its messages, which all prompts share.
#[derive(Debug)]
pub struct QuestionTemplate {
    /// Hashed text before the messages.
    before: Vec<u8>,
    /// Hashed text after the messages.
    after: Vec<u8>,
    /// Text of the fields that are not hashed, see [`write_ignored`].
    ignored: Vec<u8>,
    sample: u32,
}

impl QuestionTemplate {
    /// Serialises `request` without its messages.
    pub fn new(request: &Value, sample: u32) -> QuestionTemplate {
        let mut before = HASH_PREFIX.to_vec();
        let mut after = Vec::new();
        let is_hashed = |name: &str| !IGNORED_FIELDS.contains(&name) && name != MESSAGES;
        write_fields(request, &mut before, |name| {
            is_hashed(name) && name < MESSAGES
        });
        write_fields(request, &mut after, |name| {
            is_hashed(name) && name > MESSAGES
        });
        // The closing brace of the first half and the opening brace of the second half are replaced by commas, or
        // removed if a half has no fields.
        before.pop();
        if before.len() > HASH_PREFIX.len() + 1 {
            before.push(b',');
        }
        before.extend_from_slice(b"\"messages\":");
        after[0] = b',';
        if after == b",}" {
            after.remove(0);
        }
        let mut ignored = Vec::new();
        write_ignored(request, &mut ignored);
        QuestionTemplate {
            before,
            after,
            ignored,
            sample,
        }
    }

    /// Hashes the request with these messages. The result equals the result of [`Question::new`].
    pub fn question(&self, messages: &[Message]) -> Question {
        let mut text = Vec::with_capacity(TEXT_CAPACITY);
        text.extend_from_slice(&self.before);
        let sorted: Vec<_> = messages.iter().map(SortedMessage::from).collect();
        write_scalar(&sorted, &mut text);
        text.extend_from_slice(&self.after);
        let hashed_bytes = text.len();
        text.extend_from_slice(&self.ignored);
        Question::from_text(&mut text, hashed_bytes, self.sample)
    }
}

/// Message with its fields sorted by name, as they are hashed.
#[derive(Serialize)]
struct SortedMessage<'a> {
    content: &'a str,
    role: &'a str,
}

impl<'a> From<&'a Message> for SortedMessage<'a> {
    fn from(message: &'a Message) -> SortedMessage<'a> {
        SortedMessage {
            content: &message.content,
            role: &message.role,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn template_hashes_equal_request_hashes() {
        let messages = [
            Message::new("system", "quote \" and \\ and \u{1}"),
            Message::new("user", "ä\u{2028}\n"),
        ];
        let sent_messages = json!([{"role": "system", "content": messages[0].content},
            {"role": "user", "content": messages[1].content}]);
        for request in [
            json!({"messages": sent_messages}),
            json!({"model": "m", "messages": sent_messages}),
            json!({"logprobs": true, "messages": sent_messages, "max_tokens": 7}),
            json!({"model": "m", "messages": sent_messages, "max_completion_tokens": 512, "seed": 3, "stream": false,
                "temperature": 0.7, "logprobs": true, "extra": {"b": [1, {"d": 1, "c": null}], "a": "é"}}),
        ] {
            let mut without_messages = request.clone();
            without_messages["messages"] = json!([]);
            let template = QuestionTemplate::new(&without_messages, 4);
            assert_eq!(template.question(&messages), Question::new(&request, 4));
            assert_ne!(
                template.question(&messages[..1]),
                Question::new(&request, 4)
            );
        }
    }
}
