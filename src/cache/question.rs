//! Keys of records: hashes of the request and the endpoint.
//!
//! ```text
//! question = BLAKE3({"question":<the request without transport, sender and length fields>,"sample":i,"v":2})
//! key      = BLAKE3(question, endpoint)[..16] + question[..16]      in hex
//! ```
//!
//! All records of one question share the second half of their keys, for every endpoint; records of schema 1 have other
//! keys. An answer that was truncated at `max_tokens` has another first half (`truncated_key`), so that a run with a
//! larger `max_tokens` requests the question again.

pub(crate) mod template;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::Record;
use crate::cache::fingerprint::Fingerprint;
use crate::cache::record::is_truncated;
pub use template::QuestionTemplate;

/// Version in the hashed text of every question. Increase it if the same text gets another meaning.
const VERSION: u32 = 2;

/// Fields of a request that are not hashed: length limits, transport and sender.
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

/// Fields of a request, other than [`IGNORED_FIELDS`], that are not sampling parameters.
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

/// Initial capacity in bytes of the buffer for the hashed text; enough for most requests.
const TEXT_CAPACITY: usize = 1024;

/// Number of hex digits in half a key.
const HALF_KEY_DIGITS: usize = 32;

/// Hash of a request and its sample number, without the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    hash: blake3::Hash,
    /// Length in bytes of the whole request as JSON.
    pub bytes: usize,
}

impl Question {
    /// Hashes `request`, without the fields in `IGNORED_FIELDS`, and the number of the sample.
    pub fn new(request: &Value, sample: u32) -> Question {
        let mut text = Vec::with_capacity(TEXT_CAPACITY);
        text.extend_from_slice(HASH_PREFIX);
        write_fields(request, &mut text, |name| !IGNORED_FIELDS.contains(&name));
        let hashed_bytes = text.len();
        write_ignored(request, &mut text);
        Question::from_text(&mut text, hashed_bytes, sample)
    }

    /// Hashes the first `hashed_bytes` bytes of `text`, and `sample`. The other bytes of `text` only count towards
    /// [`Question::bytes`].
    fn from_text(text: &mut Vec<u8>, hashed_bytes: usize, sample: u32) -> Question {
        let bytes = text.len() - HASH_PREFIX.len();
        text.truncate(hashed_bytes);
        let suffix = format!(",\"sample\":{sample},\"v\":{VERSION}}}");
        text.extend_from_slice(suffix.as_bytes());
        Question {
            hash: blake3::hash(text),
            bytes,
        }
    }

    /// Returns the key of an answer by this endpoint, in the form of [`endpoint`].
    pub fn key(&self, endpoint: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.hash.as_bytes());
        hasher.update(endpoint.as_bytes());
        let hash = hasher.finalize().to_hex();
        format!(
            "{}{}",
            &hash[..HALF_KEY_DIGITS],
            &self.hash.to_hex()[..HALF_KEY_DIGITS]
        )
    }

    /// Returns the second half, in hex, of every key of this question.
    pub(crate) fn question_half(&self) -> String {
        self.hash.to_hex()[..HALF_KEY_DIGITS].to_owned()
    }

    /// Returns the fingerprint of the second half of every key of this question.
    pub(crate) fn question_fingerprint(&self) -> Fingerprint {
        let mut bytes = Fingerprint::default();
        bytes.copy_from_slice(&self.hash.as_bytes()[..HALF_KEY_DIGITS / 2]);
        bytes
    }
}

/// Endpoint, as it is hashed into keys.
#[derive(Debug, Clone)]
pub(crate) struct KeyEndpoint {
    base_url: String,
    /// Name or normalised address, in the form of [`endpoint`].
    key_part: String,
    /// Normalised address of an endpoint with a name: keys contain it if they were made before the name was set.
    by_address: Option<String>,
}

impl KeyEndpoint {
    /// Creates the key parts of an endpoint. `name` is empty if the user has not set a name.
    pub(crate) fn new(name: &str, base_url: &str) -> KeyEndpoint {
        KeyEndpoint {
            base_url: base_url.to_owned(),
            key_part: endpoint(name, base_url),
            by_address: (!name.is_empty()).then(|| endpoint("", base_url)),
        }
    }
}

/// Keys under which the answer to one request may be cached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CacheKeys {
    /// Key of a new record.
    pub key: String,
    /// Key with the address of an endpoint that has a name: the name may have been set after the answer was cached.
    pub by_address: Option<String>,
    /// Key of schema 1.
    pub schema_1: Option<String>,
}

impl CacheKeys {
    /// Returns the keys of `question` for `endpoint`. The key of schema 1 is included if the request and its sample
    /// number are passed as `request_and_sample`.
    pub(crate) fn new(
        question: &Question,
        endpoint: &KeyEndpoint,
        request_and_sample: Option<(&Value, u32)>,
    ) -> CacheKeys {
        let by_address = endpoint.by_address.as_deref();
        CacheKeys {
            key: question.key(&endpoint.key_part),
            by_address: by_address.map(|address| question.key(address)),
            schema_1: request_and_sample
                .map(|(request, sample)| schema_1_key(&endpoint.base_url, request, sample)),
        }
    }

    /// Iterates over the keys; the key of a new record comes first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        let older_keys = [self.by_address.as_deref(), self.schema_1.as_deref()];
        [Some(self.key.as_str())]
            .into_iter()
            .chain(older_keys)
            .flatten()
    }
}

/// Returns true if the record's key belongs to its request. The endpoint in a key of schema 2 is not checked.
pub(crate) fn is_key_of(record: &Record) -> bool {
    let (request, sample) = (&record.request, record.sample);
    if record.v < 2 {
        record.key == schema_1_key(&record.endpoint, request, sample)
    } else {
        question_half(&record.key) == Question::new(request, sample).question_half()
    }
}

/// Returns the second half of a key, which identifies the question; the whole key if it is shorter than half a key.
pub(crate) fn question_half(key: &str) -> &str {
    key.get(HALF_KEY_DIGITS..).unwrap_or(key)
}

/// Returns the fingerprint of the second half of a key. It equals [`Question::question_fingerprint`] of the key's
/// question.
pub(crate) fn question_fingerprint(key: &str) -> Fingerprint {
    let half = question_half(key);
    crate::cache::fingerprint::from_hex(half.as_bytes())
        .unwrap_or_else(|| crate::cache::fingerprint::fingerprint(half))
}

/// Returns `max_completion_tokens` of a request, or else `max_tokens`; `None` if neither is a number, or the number
/// does not fit into a u32.
pub fn max_tokens(request: &Value) -> Option<u32> {
    let names = ["max_completion_tokens", "max_tokens"];
    let value = names.iter().find_map(|name| request.get(*name)?.as_u64())?;
    u32::try_from(value).ok()
}

/// Returns `max_tokens` of `request` if an answer with this finish reason was truncated there, or else 0.
pub fn cut_at(request: &Value, finish_reason: &str) -> u32 {
    if is_truncated(finish_reason) {
        max_tokens(request).unwrap_or(0)
    } else {
        0
    }
}

/// Returns the key of an answer that was truncated at `max_tokens`. `key` is the key of a complete answer to the same
/// request.
pub(crate) fn truncated_key(key: &str, max_tokens: u32) -> String {
    let hash = blake3::hash(format!("{key} cut off at {max_tokens}").as_bytes());
    format!(
        "{}{}",
        &hash.to_hex()[..HALF_KEY_DIGITS],
        question_half(key)
    )
}

/// Returns the sampling parameters of a request as JSON. The text is independent of the prompt and of the seed.
pub fn sampling(request: &Value) -> String {
    let mut text = Vec::new();
    write_fields(request, &mut text, |name| {
        !IGNORED_FIELDS.contains(&name) && !NON_SAMPLING_FIELDS.contains(&name)
    });
    String::from_utf8_lossy(&text).into_owned()
}

/// Returns the key of an answer in schema 1.
pub(crate) fn schema_1_key(base_url: &str, request: &Value, sample: u32) -> String {
    let mut text = b"{\"body\":".to_vec();
    write_fields(request, &mut text, any_field);
    let endpoint = Value::from(base_url);
    let suffix = format!(",\"endpoint\":{endpoint},\"sample\":{sample},\"v\":1}}");
    text.extend_from_slice(suffix.as_bytes());
    blake3::hash(&text).to_hex().to_string()
}

/// Returns the endpoint as it is hashed into keys: its name if the user has set one, or else its normalised address.
/// Normalised means: scheme and host in lower case, without a default port or a slash at the end, and `localhost` for
/// loopback addresses.
pub fn endpoint(name: &str, base_url: &str) -> String {
    if !name.is_empty() {
        return format!("name:{name}");
    }
    let url = base_url.trim().trim_end_matches('/');
    let Some((scheme, address)) = url.split_once("://") else {
        return url.to_owned();
    };
    let scheme = scheme.to_lowercase();
    let (authority, path) = address.split_at(address.find('/').unwrap_or(address.len()));
    let authority = authority.to_lowercase();
    let default_port = match scheme.as_str() {
        "http" => ":80",
        _ => ":443",
    };
    let authority = authority.strip_suffix(default_port).unwrap_or(&authority);
    // A colon inside the brackets of an IPv6 address does not begin a port.
    let is_port = |colon: &usize| !authority[*colon..].contains(']');
    let (host, port) = match authority.rfind(':').filter(is_port) {
        Some(colon) => authority.split_at(colon),
        None => (authority, ""),
    };
    let host = match host {
        "127.0.0.1" | "[::1]" => "localhost",
        host => host,
    };
    format!("{scheme}://{host}{port}{path}")
}

/// Kinds of alternative keys that occur in a cache: keys of schema 1, and keys of truncated answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVariants {
    /// True if the cache contains records of schema 1.
    #[serde(rename = "has_old")]
    pub has_schema_1: bool,
    /// Values of `max_tokens` at which answers were truncated.
    #[serde(rename = "cuts")]
    pub truncated_at: BTreeSet<u32>,
}

impl KeyVariants {
    /// Adds a record by its schema and `cut_at`.
    pub fn insert(&mut self, schema: u32, cut_at: u32) {
        self.has_schema_1 |= schema < 2;
        if cut_at > 0 {
            self.truncated_at.insert(cut_at);
        }
    }

    /// Adds all variants of `other`.
    pub fn add(&mut self, other: &KeyVariants) {
        self.has_schema_1 |= other.has_schema_1;
        self.truncated_at.extend(&other.truncated_at);
    }

    /// Returns the possible keys of answers that were truncated at `max_tokens` or more tokens. `key` is the key of a
    /// complete answer to the same request.
    pub(crate) fn truncated_keys(
        &self,
        key: &str,
        max_tokens: u32,
    ) -> impl Iterator<Item = String> {
        let limits = self.truncated_at.range(max_tokens..);
        limits.map(move |limit| truncated_key(key, *limit))
    }
}

/// Writes `value` as JSON with sorted object keys. From the outermost object, only the fields that `is_wanted` accepts
/// are written.
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

/// Writes the fields in [`IGNORED_FIELDS`], in the order of the request. Only the length of this text is used, so its
/// separators may be in the wrong order.
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
    // Serialising a scalar to a vector cannot fail.
    serde_json::to_writer(text, &value).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn question_ignores_transport_and_length_fields() {
        let body = json!({"model": "m", "messages": [], "max_tokens": 5, "temperature": 1.0});
        let same_question = [
            json!({"temperature": 1.0, "messages": [], "model": "m"}),
            json!({"model": "m", "messages": [], "max_completion_tokens": 9, "temperature": 1.0, "stream": false, "user": "u"}),
        ];
        let key = |body: &Value, sample| Question::new(body, sample).key("e");
        for other in &same_question {
            assert_eq!(key(&body, 0), key(other, 0));
        }
        let other_questions = [
            json!({"model": "n", "messages": [], "temperature": 1.0}),
            json!({"model": "m", "messages": [{"user": "u"}], "temperature": 1.0}),
            json!({"model": "m", "messages": [], "temperature": 0.5}),
        ];
        for other in &other_questions {
            assert_ne!(question_half(&key(&body, 0)), question_half(&key(other, 0)));
        }
        assert_ne!(question_half(&key(&body, 0)), question_half(&key(&body, 1)));
        // The endpoint changes only the first half.
        let other_endpoint = Question::new(&body, 0).key("f");
        assert_ne!(key(&body, 0), other_endpoint);
        assert_eq!(
            question_half(&key(&body, 0)),
            question_half(&other_endpoint)
        );
        assert_eq!(
            question_half(&other_endpoint),
            Question::new(&body, 0).question_half()
        );
    }

    #[test]
    fn truncated_answer_is_found_for_requests_up_to_its_max_tokens() {
        let key = Question::new(&json!({}), 0).key("e");
        let mut key_variants = KeyVariants::default();
        key_variants.insert(2, 512);
        key_variants.insert(2, 0);
        let truncated = truncated_key(&key, 512);
        assert_eq!(question_half(&truncated), question_half(&key));
        for (max_tokens, is_found) in [(1, true), (512, true), (513, false)] {
            let mut keys = key_variants.truncated_keys(&key, max_tokens);
            assert_eq!(
                keys.any(|key| key == truncated),
                is_found,
                "max_tokens = {max_tokens}"
            );
        }
        assert!(!key_variants.has_schema_1);
    }

    #[test]
    fn endpoint_addresses_are_normalised() {
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
        // Golden keys: if one changes, every run pays for its whole cache again.
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
