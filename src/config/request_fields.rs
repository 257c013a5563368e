//! Checks that `sampling.extra` contains no field that another setting controls.

use serde_json::{Map, Value};

use super::error::Mistake;

/// Advice for fields with the number of answers.
const SAMPLES: &str = "set `prompts.samples` instead, so that each answer has its own record";
/// Advice for fields with the maximum length of an answer.
const MAX_TOKENS: &str = "set `sampling.max_tokens` and, for its name in the request, \
                          `sampling.max_tokens_field`: the budget depends on them";

/// Fields that `sampling.extra` must not contain, because they change the prompt, the model or the cost of a request.
/// Each field has advice for the error message.
const RESERVED: [(&str, &str); 14] = [
    ("n", SAMPLES),
    ("best_of", SAMPLES),
    ("num_return_sequences", SAMPLES),
    ("candidateCount", SAMPLES),
    ("candidate_count", SAMPLES),
    ("max_tokens", MAX_TOKENS),
    ("max_completion_tokens", MAX_TOKENS),
    ("max_output_tokens", MAX_TOKENS),
    ("maxOutputTokens", MAX_TOKENS),
    ("max_new_tokens", MAX_TOKENS),
    ("max_length", MAX_TOKENS),
    ("num_predict", MAX_TOKENS),
    ("messages", "the prompts come from `prompts.source`"),
    ("model", "set `teacher.model` instead"),
];

/// Names of objects in `sampling.extra` whose fields some servers treat as fields of the request.
const CONTAINERS: [&str; 6] = [
    "extra_body",
    "options",
    "parameters",
    "generation_config",
    "generationConfig",
    "sampling_params",
];

/// Rejects reserved fields, and streaming.
///
/// # Errors
/// If `extra` or an object in it that [`CONTAINERS`] lists has a field of [`RESERVED`], or a `stream` other than false.
/// The message names the setting to use instead.
pub(crate) fn check_extra(extra: &Map<String, Value>) -> Result<(), Mistake> {
    let reject = |field: &str, advice: &str| {
        let message = format!("`sampling.extra` must not contain `{field}`: {advice}");
        Err(Mistake::new("sampling.extra", message))
    };
    for (field, advice) in RESERVED {
        if extra.contains_key(field) {
            return reject(field, advice);
        }
    }
    if extra.get("stream").is_some_and(|stream| stream != false) {
        let advice = "streaming is not supported; set it to false or remove it";
        return reject("stream", advice);
    }
    let containers = CONTAINERS
        .iter()
        .filter_map(|name| extra.get(*name)?.as_object());
    containers.into_iter().try_for_each(check_extra)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reserved_fields_are_rejected() {
        let assert_rejected = |extra: Value, field: &str| {
            let error = check_extra(extra.as_object().unwrap()).unwrap_err();
            assert!(error.message.contains(&format!("`{field}`")), "{error:?}");
        };
        for (field, _) in RESERVED {
            assert_rejected(json!({ field: 2 }), field);
            assert_rejected(json!({"extra_body": { field: 2 }}), field);
        }
        assert_rejected(json!({"stream": true}), "stream");
        // Reserved names are allowed inside the parameters of a tool.
        let tools = json!([{"function": {"parameters": {"properties": {"n": {}, "model": {}}}}}]);
        let allowed = json!({"stream": false, "tools": tools});
        check_extra(allowed.as_object().unwrap()).unwrap();
    }
}
