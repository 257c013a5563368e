//! Keys of records: hashes of the request and the endpoint.
//!
//! ```text
//! question = BLAKE3({"question":<the request without fields that do not change the answer>,"sample":i,"v":2})
//! key      = BLAKE3(question, endpoint)[..16] + question[..16]      in hex
//! ```
//!
//! Records of one question share the second half of their keys, whichever endpoint answered. An answer that was
//! truncated at `max_tokens` has another key: with a larger `max_tokens` the question is open again.

pub(crate) mod template;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::Record;
use crate::cache::fingerprint::Fingerprint;
pub use template::QuestionTemplate;

/// Version in every question: increase it if the same text gets another meaning.
const VERSION: u32 = 2;

/// Fields of a request that do not change the answer: transport, sender and length limits.
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

/// Fields that are not sampling parameters, in addition to [`IGNORED_FIELDS`].
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

/// Capacity in bytes for the text of most requests.
const USUAL_BYTES: usize = 1024;

/// Number of hex digits in half a key.
const HALF_KEY_DIGITS: usize = 32;

/// Hash of a request without its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    hash: blake3::Hash,
    /// Length of the request as JSON in bytes.
    pub bytes: usize,
}

impl Question {
    /// Hashes a request without the fields in `IGNORED_FIELDS`.
    pub fn new(request: &Value, sample: u32) -> Question {
        let mut text = Vec::with_capacity(USUAL_BYTES);
        text.extend_from_slice(HASH_PREFIX);
        write_fields(request, &mut text, |name| !IGNORED_FIELDS.contains(&name));
        let end = text.len();
        write_ignored(request, &mut text);
        Question::from_text(&mut text, end, sample)
    }

    /// Hashes the first `end` bytes of `text`; the rest only counts towards `bytes`.
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

    /// Key of the answer of this endpoint.
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

    /// Second half, in hex, of every key of this question.
    pub fn question_half(&self) -> String {
        self.hash.to_hex()[..HALF_KEY_DIGITS].to_owned()
    }

    /// Fingerprint of the second half of every key of this question.
    pub fn question_fingerprint(&self) -> Fingerprint {
        let mut bytes = Fingerprint::default();
        bytes.copy_from_slice(&self.hash.as_bytes()[..HALF_KEY_DIGITS / 2]);
        bytes
    }
}

/// Endpoint as part of a key.
#[derive(Debug, Clone)]
pub struct KeyEndpoint {
    base_url: String,
    key_part: String,
    /// Part of the key before the endpoint was given a name.
    by_address: Option<String>,
}

impl KeyEndpoint {
    /// `name` is empty if the user has set none.
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
    /// Key of a new record.
    pub key: String,
    /// Key by the endpoint's address, if the endpoint has a name: the name may have been set later.
    pub by_address: Option<String>,
    /// Key of schema 1.
    pub schema_1: Option<String>,
}

impl CacheKeys {
    /// `old` is the request and its sample; if it is given, the key of schema 1 is included.
    pub fn new(
        question: &Question,
        endpoint: &KeyEndpoint,
        old: Option<(&Value, u32)>,
    ) -> CacheKeys {
        let by_address = endpoint.by_address.as_deref();
        CacheKeys {
            key: question.key(&endpoint.key_part),
            by_address: by_address.map(|address| question.key(address)),
            schema_1: old
                .map(|(request, sample)| schema_1_key(&endpoint.base_url, request, sample)),
        }
    }

    /// Iterates over the keys; the key of a new record comes first.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let others = [self.by_address.as_deref(), self.schema_1.as_deref()];
        [Some(self.key.as_str())]
            .into_iter()
            .chain(others)
            .flatten()
    }
}

/// Returns true if the record's key belongs to its request, for any endpoint.
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

/// Fingerprint of the second half of a key; equals [`Question::question_fingerprint`] of its question.
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

/// Returns `max_tokens` if an answer to this request was truncated there, else 0.
pub fn cut_at(request: &Value, finish_reason: &str) -> u32 {
    match finish_reason {
        "length" | "max_tokens" => max_tokens(request).unwrap_or(0),
        _ => 0,
    }
}

/// Key of an answer that was truncated at `max_tokens`.
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

/// Key of an answer in schema 1.
pub fn schema_1_key(base_url: &str, request: &Value, sample: u32) -> String {
    let mut text = b"{\"body\":".to_vec();
    write_fields(request, &mut text, any_field);
    let endpoint = Value::from(base_url);
    let rest = format!(",\"endpoint\":{endpoint},\"sample\":{sample},\"v\":1}}");
    text.extend_from_slice(rest.as_bytes());
    blake3::hash(&text).to_hex().to_string()
}

/// Endpoint as it is hashed into keys: its name if the user has set one, or else its normalised address.
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
    /// True if the cache holds records of schema 1.
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

    pub fn add(&mut self, other: &KeyVariants) {
        self.has_schema_1 |= other.has_schema_1;
        self.truncated_at.extend(&other.truncated_at);
    }

    /// Keys of truncated answers to the question of `key` that have at least `max_tokens` tokens.
    pub fn truncated_keys(&self, key: &str, max_tokens: u32) -> impl Iterator<Item = String> {
        let cuts = self.truncated_at.range(max_tokens..);
        cuts.map(move |cut| truncated_key(key, *cut))
    }
}

/// Writes `value` as JSON with sorted object keys. Of the outermost object only the fields that `is_wanted`
/// accepts are written.
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
    fn truncated_answer_is_found_up_to_its_max_tokens() {
        let key = Question::new(&json!({}), 0).key("e");
        let mut key_variants = KeyVariants::default();
        key_variants.insert(2, 512);
        key_variants.insert(2, 0);
        let cut = truncated_key(&key, 512);
        assert_eq!(question_half(&cut), question_half(&key));
        for (max_tokens, is_found) in [(1, true), (512, true), (513, false)] {
            let mut keys = key_variants.truncated_keys(&key, max_tokens);
            assert_eq!(keys.any(|name| name == cut), is_found, "{max_tokens}");
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
