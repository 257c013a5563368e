//! The name of a record: what is asked of whom, and nothing else.
//!
//! ```text
//! question = BLAKE3({"question":<the request without what changes no answer>,"sample":i,"v":2})
//! key      = BLAKE3(question, endpoint)[..16] + question[..16]      in hex
//! ```
//!
//! So two records of one question share the second half of their keys, whoever answered. An answer that was
//! cut off at `max_tokens` has a key of its own: with a larger `max_tokens` the question is open again.

pub(crate) mod template;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::Record;
use crate::cache::fingerprint::Fingerprint;
pub use template::QuestionTemplate;

/// Part of every question: raise it when the same text would come to mean something else.
const VERSION: u32 = 2;

/// Fields of a request that change no answer: how it is sent, who sends it, and how much of it is taken.
const IGNORED_FIELDS: [&str; 10] = [
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
];

/// Fields that are no sampling parameters, beside [`IGNORED_FIELDS`].
const NON_SAMPLING_FIELDS: [&str; 10] = [
    "model",
    "messages",
    "seed",
    "n",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "response_format",
];

/// First bytes of the text that is hashed.
const HASH_PREFIX: &[u8] = b"{\"question\":";

/// Room for the text of most requests.
const USUAL_BYTES: usize = 1024;

/// Hex digits of half a key.
const HALF_KEY_DIGITS: usize = 32;

/// Hash of a request without its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    hash: blake3::Hash,
    /// Bytes of the request as JSON.
    pub bytes: usize,
}

impl Question {
    pub fn new(request: &Value, sample: u32) -> Question {
        let mut text = Vec::with_capacity(USUAL_BYTES);
        text.extend_from_slice(HASH_PREFIX);
        write_fields(request, &mut text, |name| !IGNORED_FIELDS.contains(&name));
        let end = text.len();
        write_ignored(request, &mut text);
        Question::from_text(&mut text, end, sample)
    }

    /// Hashes the first `end` bytes of the text; the rest only counts towards `bytes`.
    fn from_text(text: &mut Vec<u8>, end: usize, sample: u32) -> Question {
        let bytes = text.len() - HASH_PREFIX.len();
        text.truncate(end);
        let rest = format!(",\"sample\":{sample},\"v\":{VERSION}}}");
        text.extend_from_slice(rest.as_bytes());
        Question {
            hash: blake3::hash(text),
            bytes,
        }
    }

    /// Its key, where this endpoint is asked.
    pub fn key(&self, endpoint: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.hash.as_bytes());
        hasher.update(endpoint.as_bytes());
        let asked = hasher.finalize().to_hex();
        format!(
            "{}{}",
            &asked[..HALF_KEY_DIGITS],
            &self.hash.to_hex()[..HALF_KEY_DIGITS]
        )
    }

    /// Second half of every key of this question, in hex.
    pub fn question_half(&self) -> String {
        self.hash.to_hex()[..HALF_KEY_DIGITS].to_owned()
    }

    /// Fingerprint of that half.
    pub fn question_fingerprint(&self) -> Fingerprint {
        let mut bytes = Fingerprint::default();
        bytes.copy_from_slice(&self.hash.as_bytes()[..HALF_KEY_DIGITS / 2]);
        bytes
    }
}

/// An endpoint as the keys of its answers name it.
#[derive(Debug, Clone)]
pub struct KeyEndpoint {
    base_url: String,
    key_part: String,
    /// What was a part of the key before it was given a name.
    by_address: Option<String>,
}

impl KeyEndpoint {
    /// `name` is empty where the user has given it none.
    pub fn new(name: &str, base_url: &str) -> KeyEndpoint {
        KeyEndpoint {
            base_url: base_url.to_owned(),
            key_part: endpoint(name, base_url),
            by_address: (!name.is_empty()).then(|| endpoint("", base_url)),
        }
    }
}

/// Keys under which the answer to one request may be cached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheKeys {
    /// The key of a new record.
    pub key: String,
    /// By the address, if the endpoint has a name: it may have been given later.
    pub by_address: Option<String>,
    /// Of schema 1.
    pub old: Option<String>,
}

impl CacheKeys {
    /// `old` is the request and its sample; if given, the key of schema 1 is included.
    pub fn new(
        question: &Question,
        endpoint: &KeyEndpoint,
        old: Option<(&Value, u32)>,
    ) -> CacheKeys {
        let by_address = endpoint.by_address.as_deref();
        CacheKeys {
            key: question.key(&endpoint.key_part),
            by_address: by_address.map(|address| question.key(address)),
            old: old.map(|(request, sample)| schema_1_key(&endpoint.base_url, request, sample)),
        }
    }

    /// The new key first.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let others = [self.by_address.as_deref(), self.old.as_deref()];
        [Some(self.key.as_str())]
            .into_iter()
            .chain(others)
            .flatten()
    }
}

/// Returns true if the key of the record is one of its request, whoever was asked.
pub fn is_key_of(record: &Record) -> bool {
    let (request, sample) = (&record.request, record.sample);
    if record.v < 2 {
        record.key == schema_1_key(&record.endpoint, request, sample)
    } else {
        question_half(&record.key) == Question::new(request, sample).question_half()
    }
}

/// Second half of a key, which identifies the question.
pub fn question_half(key: &str) -> &str {
    key.get(HALF_KEY_DIGITS..).unwrap_or(key)
}

/// Fingerprint of the second half of a key; that of [`Question::fingerprint`] if the key is of a question.
pub fn question_fingerprint(key: &str) -> Fingerprint {
    let half = question_half(key);
    crate::cache::fingerprint::from_hex(half.as_bytes())
        .unwrap_or_else(|| crate::cache::fingerprint::fingerprint(half))
}

/// `max_tokens` of a request, under either of its names.
pub fn max_tokens(request: &Value) -> Option<u32> {
    let fields = ["max_completion_tokens", "max_tokens"];
    let value = fields
        .iter()
        .find_map(|name| request.get(*name)?.as_u64())?;
    u32::try_from(value).ok()
}

/// `max_tokens` if an answer to this request was truncated there, else 0.
pub fn cut_at(request: &Value, finish_reason: &str) -> u32 {
    match finish_reason {
        "length" | "max_tokens" => max_tokens(request).unwrap_or(0),
        _ => 0,
    }
}

/// The key of an answer that was cut off at so many tokens.
pub fn truncated_key(key: &str, max_tokens: u32) -> String {
    let hash = blake3::hash(format!("{key} cut off at {max_tokens}").as_bytes());
    format!(
        "{}{}",
        &hash.to_hex()[..HALF_KEY_DIGITS],
        question_half(key)
    )
}

/// Sampling parameters of a request as JSON, the same for all its prompts and samples.
pub fn sampling(request: &Value) -> String {
    let mut text = Vec::new();
    write_fields(request, &mut text, |name| {
        !IGNORED_FIELDS.contains(&name) && !NON_SAMPLING_FIELDS.contains(&name)
    });
    String::from_utf8_lossy(&text).into_owned()
}

/// The key under which versions up to schema 1 kept the answer.
pub fn schema_1_key(base_url: &str, request: &Value, sample: u32) -> String {
    let mut text = b"{\"body\":".to_vec();
    write_fields(request, &mut text, any_field);
    let endpoint = Value::from(base_url);
    let rest = format!(",\"endpoint\":{endpoint},\"sample\":{sample},\"v\":1}}");
    text.extend_from_slice(rest.as_bytes());
    blake3::hash(&text).to_hex().to_string()
}

/// An endpoint as keys name it: by the name that the user has given it, or else by its address, in the one
/// spelling of all that mean the same.
pub fn endpoint(name: &str, base_url: &str) -> String {
    if !name.is_empty() {
        return format!("name:{name}");
    }
    let url = base_url.trim().trim_end_matches('/');
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let scheme = scheme.to_lowercase();
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let authority = authority.to_lowercase();
    let default = match scheme.as_str() {
        "http" => ":80",
        _ => ":443",
    };
    let authority = authority.strip_suffix(default).unwrap_or(&authority);
    let (host, port) = match authority
        .rfind(':')
        .filter(|at| !authority[*at..].contains(']'))
    {
        Some(at) => authority.split_at(at),
        None => (authority, ""),
    };
    let host = match host {
        "127.0.0.1" | "[::1]" => "localhost",
        host => host,
    };
    format!("{scheme}://{host}{port}{path}")
}

/// Alternative keys that may occur in a cache: keys of schema 1, and keys of truncated answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVariants {
    /// Records of schema 1, under keys of that time.
    pub has_old: bool,
    /// Values of `max_tokens` at which answers were truncated.
    pub cuts: BTreeSet<u32>,
}

impl KeyVariants {
    pub fn note(&mut self, schema: u32, cut_at: u32) {
        self.has_old |= schema < 2;
        if cut_at > 0 {
            self.cuts.insert(cut_at);
        }
    }

    pub fn add(&mut self, other: &KeyVariants) {
        self.has_old |= other.has_old;
        self.cuts.extend(&other.cuts);
    }

    /// The keys under which an answer to the question of this key may be that was cut off no earlier than
    /// at `max_tokens`.
    pub fn truncated_keys(&self, key: &str, max_tokens: u32) -> impl Iterator<Item = String> {
        let cuts = self.cuts.range(max_tokens..);
        cuts.map(move |cut| truncated_key(key, *cut))
    }
}

/// Writes the value with the keys of every object sorted, and of the outermost one those that are wanted.
fn write_fields(value: &Value, text: &mut Vec<u8>, is_wanted: impl Fn(&str) -> bool) {
    match value {
        Value::Object(fields) => {
            let mut sorted: Vec<_> = fields.iter().filter(|(name, _)| is_wanted(name)).collect();
            sorted.sort_unstable_by_key(|(name, _)| name.as_str());
            text.push(b'{');
            for (index, (name, value)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                write_scalar(name.as_str(), text);
                text.push(b':');
                write_fields(value, text, any_field);
            }
            text.push(b'}');
        }
        Value::Array(items) => {
            text.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                write_fields(item, text, any_field);
            }
            text.push(b']');
        }
        scalar => write_scalar(scalar, text),
    }
}

/// Writes the fields in [`IGNORED_FIELDS`], in the order of the request.
fn write_ignored(request: &Value, text: &mut Vec<u8>) {
    let fields = request.as_object().into_iter().flatten();
    for (name, value) in fields.filter(|(name, _)| IGNORED_FIELDS.contains(&name.as_str())) {
        write_scalar(name, text);
        text.extend_from_slice(b":,");
        write_fields(value, text, any_field);
    }
}

fn any_field(_: &str) -> bool {
    true
}

fn write_scalar(value: impl Serialize, text: &mut Vec<u8>) {
    // A scalar always has a JSON text, and a vector room for it.
    serde_json::to_writer(text, &value).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn how_an_answer_is_sent_and_how_much_of_it_is_taken_is_no_part_of_the_question() {
        let body = json!({"model": "m", "messages": [], "max_tokens": 5, "temperature": 1.0});
        let same = [
            json!({"temperature": 1.0, "messages": [], "model": "m"}),
            json!({"model": "m", "messages": [], "max_completion_tokens": 9, "temperature": 1.0, "stream": false, "user": "u"}),
        ];
        let key = |body: &Value, sample| Question::new(body, sample).key("e");
        for other in &same {
            assert_eq!(key(&body, 0), key(other, 0));
        }
        let other = [
            json!({"model": "n", "messages": [], "temperature": 1.0}),
            json!({"model": "m", "messages": [{"user": "u"}], "temperature": 1.0}),
            json!({"model": "m", "messages": [], "temperature": 0.5}),
        ];
        for other in &other {
            assert_ne!(question_half(&key(&body, 0)), question_half(&key(other, 0)));
        }
        assert_ne!(question_half(&key(&body, 0)), question_half(&key(&body, 1)));
        // Of whom it is asked is in the first half alone.
        let elsewhere = Question::new(&body, 0).key("f");
        assert_ne!(key(&body, 0), elsewhere);
        assert_eq!(question_half(&key(&body, 0)), question_half(&elsewhere));
        assert_eq!(
            question_half(&elsewhere),
            Question::new(&body, 0).question_half()
        );
    }

    #[test]
    fn an_answer_that_was_cut_off_is_found_up_to_where_it_was_cut() {
        let key = Question::new(&json!({}), 0).key("e");
        let mut past = KeyVariants::default();
        past.note(2, 512);
        past.note(2, 0);
        let cut = truncated_key(&key, 512);
        assert_eq!(question_half(&cut), question_half(&key));
        for (max_tokens, is_found) in [(1, true), (512, true), (513, false)] {
            let mut keys = past.truncated_keys(&key, max_tokens);
            assert_eq!(keys.any(|name| name == cut), is_found, "{max_tokens}");
        }
        assert!(!past.has_old);
    }

    #[test]
    fn one_endpoint_has_one_name_however_its_address_is_spelled() {
        for (spelling, expected) in [
            (
                "HTTPS://API.Example.com:443/v1/",
                "https://api.example.com/v1",
            ),
            ("https://api.example.com/V1", "https://api.example.com/V1"),
            ("http://127.0.0.1:8000/v1", "http://localhost:8000/v1"),
            ("http://[::1]:8000/v1", "http://localhost:8000/v1"),
            ("http://[::1]/v1", "http://localhost/v1"),
            ("http://localhost:80", "http://localhost"),
            ("http://10.0.0.1:80/v1", "http://10.0.0.1/v1"),
        ] {
            assert_eq!(endpoint("", spelling), expected);
        }
        assert_eq!(endpoint("mine", "https://x"), "name:mine");
    }

    #[test]
    fn keys_never_change() {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}],
            "max_completion_tokens": 512, "temperature": 1.0, "logprobs": true, "top_logprobs": 20});
        // Golden keys: should one change, every cache would be bought again.
        assert_eq!(
            schema_1_key("http://a/v1", &body, 0),
            "93c719aebe2658e2afeb28e1bc0e94468267cc514d5a71ff383956a79309f425"
        );
        let key = Question::new(&body, 0).key(&endpoint("", "http://a/v1"));
        assert_eq!(
            key,
            "baf29abff0d7df240deeb62c1d4e1694bb9800ba08e76b338c188e77f6bf5eab"
        );
        assert_eq!(
            truncated_key(&key, 512),
            "bdf4a81453f9888b294b5792f8e7d813bb9800ba08e76b338c188e77f6bf5eab"
        );
        assert_eq!(Question::new(&body, 0).bytes, body.to_string().len());
    }
}
