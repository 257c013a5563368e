//! [`QuestionTemplate`]: hashes requests that differ only in their messages.

use serde::Serialize;
use serde_json::Value;

use super::{
    HASH_PREFIX, IGNORED_FIELDS, Question, USUAL_BYTES, write_fields, write_ignored, write_scalar,
};
use crate::prompt::message::Message;

const MESSAGES: &str = "messages";

/// A serialised request without its messages, shared by all prompts.
#[derive(Debug)]
pub struct QuestionTemplate {
    before: Vec<u8>,
    after: Vec<u8>,
    ignored: Vec<u8>,
    sample: u32,
}

impl QuestionTemplate {
    /// The messages of `request` are ignored.
    pub fn new(request: &Value, sample: u32) -> QuestionTemplate {
        let mut before = HASH_PREFIX.to_vec();
        let mut after = Vec::new();
        let is_part = |name: &str| !IGNORED_FIELDS.contains(&name) && name != MESSAGES;
        write_fields(request, &mut before, |name| {
            is_part(name) && name < MESSAGES
        });
        write_fields(request, &mut after, |name| is_part(name) && name > MESSAGES);
        // Joins the two halves: without the braces between them, and with commas if there are fields.
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

    /// Returns the same as [`Question::new`] for the request with these messages.
    pub fn question(&self, messages: &[Message]) -> Question {
        let mut text = Vec::with_capacity(USUAL_BYTES);
        text.extend_from_slice(&self.before);
        let sorted: Vec<_> = messages.iter().map(SortedMessage::from).collect();
        write_scalar(&sorted, &mut text);
        text.extend_from_slice(&self.after);
        let end = text.len();
        text.extend_from_slice(&self.ignored);
        Question::from_text(&mut text, end, self.sample)
    }
}

/// A message with its fields sorted by name, as they are hashed.
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
        let sent = json!([{"role": "system", "content": messages[0].content},
            {"role": "user", "content": messages[1].content}]);
        for request in [
            json!({"messages": sent}),
            json!({"model": "m", "messages": sent}),
            json!({"logprobs": true, "messages": sent, "max_tokens": 7}),
            json!({"model": "m", "messages": sent, "max_completion_tokens": 512, "seed": 3, "stream": false,
                "temperature": 0.7, "logprobs": true, "extra": {"b": [1, {"d": 1, "c": null}], "a": "é"}}),
        ] {
            let mut other = request.clone();
            other["messages"] = json!([]);
            let template = QuestionTemplate::new(&other, 4);
            assert_eq!(template.question(&messages), Question::new(&request, 4));
            assert_ne!(
                template.question(&messages[..1]),
                Question::new(&request, 4)
            );
        }
    }
}
