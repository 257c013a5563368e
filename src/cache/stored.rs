//! Stored form of the fields whose shape varies from record to record: each field has the same type in every record.
//!
//! Readers that infer a schema (pyarrow, and `datasets` on top of it) infer it from the first megabytes. They fail if
//! the shape changes later: a null that becomes an object, an empty list that gets items, an object with other fields.
//! All of these occur in one cache, for example if the config changes between two runs.

/// Request body: `model` and `messages` as fields, and all other parameters as JSON in the string `params`. A model
/// that is not a string stays in `params`. So does the whole list of messages if one of them is not just a role and a
/// text. A body that is not an object is stored whole in `params`.
pub(crate) mod request {
    use serde::de::Error as _;
    use serde::ser::{Error as _, SerializeStruct};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::Value;

    use crate::prompt::message::Message;

    #[derive(Deserialize)]
    struct StoredRequest {
        model: String,
        messages: Vec<Message>,
        params: String,
    }

    /// Borrowed message, with its fields in the order of [`Message`].
    #[derive(Serialize)]
    struct PlainMessage<'a> {
        role: &'a str,
        content: &'a str,
    }

    /// Serialises without copying the messages, because this runs for each answer.
    pub(crate) fn serialize<S: Serializer>(
        request: &Value,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let field = |name: &str| request.get(name);
        let model = field("model").and_then(Value::as_str).unwrap_or_default();
        let messages = field("messages")
            .and_then(plain_messages)
            .unwrap_or_default();
        let params = match request {
            Value::Object(fields) => {
                let other_fields = OtherFields {
                    fields,
                    without_model: !model.is_empty(),
                    without_messages: !messages.is_empty(),
                };
                serde_json::to_string(&other_fields)
            }
            other => serde_json::to_string(other),
        };
        let mut stored = serializer.serialize_struct("Stored", 3)?;
        stored.serialize_field("model", model)?;
        stored.serialize_field("messages", &messages)?;
        stored.serialize_field("params", &params.map_err(S::Error::custom)?)?;
        stored.end()
    }

    /// All fields of a request, except for `model` and `messages` where these are stored separately.
    struct OtherFields<'a> {
        fields: &'a serde_json::Map<String, Value>,
        without_model: bool,
        without_messages: bool,
    }

    impl Serialize for OtherFields<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_map(self.fields.iter().filter(|(name, _)| {
                !(self.without_model && *name == "model"
                    || self.without_messages && *name == "messages")
            }))
        }
    }

    /// Returns the messages; `None` unless each of them is just a role and a text.
    fn plain_messages(messages: &Value) -> Option<Vec<PlainMessage<'_>>> {
        messages
            .as_array()?
            .iter()
            .map(|message| match message.as_object() {
                Some(fields) if fields.len() == 2 => Some(PlainMessage {
                    role: fields.get("role")?.as_str()?,
                    content: fields.get("content")?.as_str()?,
                }),
                _ => None,
            })
            .collect()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Value, D::Error> {
        let stored = StoredRequest::deserialize(deserializer)?;
        let params = serde_json::from_str(&stored.params).map_err(D::Error::custom)?;
        let Value::Object(params) = params else {
            return Ok(params);
        };
        let mut fields = serde_json::Map::new();
        if !stored.model.is_empty() {
            fields.insert("model".to_owned(), Value::String(stored.model));
        }
        if !stored.messages.is_empty() {
            let messages = serde_json::to_value(stored.messages).map_err(D::Error::custom)?;
            fields.insert("messages".to_owned(), messages);
        }
        fields.extend(params);
        Ok(Value::Object(fields))
    }
}

/// Unknown response fields, as JSON in a string.
pub(crate) mod extra {
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};
    use serde_json::{Map, Value};

    pub(crate) fn serialize<S: Serializer>(
        extra: &Map<String, Value>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = serde_json::to_string(extra).map_err(S::Error::custom)?;
        serializer.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Map<String, Value>, D::Error> {
        let text = String::deserialize(deserializer)?;
        serde_json::from_str(&text).map_err(D::Error::custom)
    }
}

/// Token usage. `None` is stored as zeros, because no answer has zero tokens.
pub(crate) mod usage {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::cache::usage::Usage;

    pub(crate) fn serialize<S: Serializer>(
        usage: &Option<Usage>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        usage.unwrap_or_default().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Usage>, D::Error> {
        let usage = Usage::deserialize(deserializer)?;
        Ok((usage != Usage::default()).then_some(usage))
    }
}

/// Cost in US dollars. `None`, and a cost that is not finite, are stored as 0; 0 is read as `None`.
pub(crate) mod cost {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        cost: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        cost.filter(|usd| usd.is_finite())
            .unwrap_or(0.0)
            .serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        let usd = f64::deserialize(deserializer)?;
        Ok((usd != 0.0).then_some(usd))
    }
}

/// Tokens that are not UTF-8, as `position:rank:hex` separated by spaces.
pub(crate) mod raw {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::cache::raw_token::RawToken;

    pub(crate) fn serialize<S: Serializer>(
        raw: &[RawToken],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let tokens: Vec<String> = raw
            .iter()
            .map(|token| format!("{}:{}:{}", token.position, token.rank, token.hex))
            .collect();
        serializer.serialize_str(&tokens.join(" "))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<RawToken>, D::Error> {
        let text = String::deserialize(deserializer)?;
        tokens(&text)
            .map_err(|token| D::Error::custom(format_args!("`{token}` is not position:rank:hex")))
    }

    /// Parses the tokens in `text`; the error is the first invalid one.
    pub(crate) fn tokens(text: &str) -> Result<Vec<RawToken>, &str> {
        text.split_whitespace()
            .map(|token| parse(token).ok_or(token))
            .collect()
    }

    fn parse(token: &str) -> Option<RawToken> {
        let mut parts = token.splitn(3, ':');
        Some(RawToken {
            position: parts.next()?.parse().ok()?,
            rank: parts.next()?.parse().ok()?,
            hex: parts.next()?.to_owned(),
        })
    }
}
