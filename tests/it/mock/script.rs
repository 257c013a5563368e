//! The script file of the mock: its example and its error messages.

use std::collections::BTreeSet;
use std::path::Path;

use distill::exit::Exit;
use distill::mock::script::Script;
use distill::mock::script::fault::ScriptedFault;
use distill::mock::script::fault_kind::FaultKind;
use serde_json::Value;

const EXAMPLE: &str = include_str!("../../mock/example.toml");

/// Returns the example with its optional keys set: `# key = value` becomes `key = value`.
fn uncommented() -> String {
    let is_setting = |comment: &str| {
        comment == "[[faults]]"
            || comment
                .split_once(" = ")
                .is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(comment) if is_setting(comment) => comment,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// Returns all keys of a script as `section.key`.
fn keys(script: &Script) -> BTreeSet<String> {
    let json = serde_json::to_value(script).unwrap();
    let mut keys = BTreeSet::new();
    for (section, value) in json.as_object().unwrap() {
        match value {
            Value::Object(fields) => {
                keys.extend(fields.keys().map(|key| format!("{section}.{key}")));
            }
            _ => drop(keys.insert(section.clone())),
        }
    }
    keys
}

#[test]
fn example_equals_the_defaults_and_has_every_key() {
    let parse = |text: &str| Script::parse(Path::new("x"), text).unwrap();
    assert_eq!(parse(EXAMPLE), Script::default());
    let text = uncommented();
    let full = parse(&text);
    // An optional key that the example lacks would be null.
    let json = serde_json::to_string(&full).unwrap();
    assert!(!json.contains("null"), "{json}");
    for key in keys(&Script::default()) {
        let key = key.rsplit('.').next().unwrap();
        let is_set = text
            .lines()
            .any(|line| line.starts_with(&format!("{key} = ")));
        assert!(is_set || key == "faults", "the example lacks {key}");
    }
    assert_eq!(full.faults.len(), 1);
    assert_ne!(full.faults, [ScriptedFault::new(FaultKind::Http(503))]);
    for kind in FaultKind::all() {
        assert!(
            EXAMPLE.contains(&format!("\"{kind}\"")),
            "the example lacks {kind}"
        );
    }
}

#[test]
fn script_error_names_line_key_and_suggestion() {
    for (text, parts) in [
        (
            "[limits]\nrequests_per_minut = 3",
            &["script.toml:2:1", "did you mean \"requests_per_minute\"?"][..],
        ),
        (
            "[limit]\n",
            &["script.toml:1:2", "did you mean \"limits\"?"],
        ),
        (
            "[[faults]]\nkind = \"reset in boddy\"",
            &["script.toml:2:8", "did you mean \"reset in body\"?"],
        ),
        ("[[faults]]\nkind = \"http 700\"", &["from 200 to 599"]),
        ("[[faults]]\nfirst = 1", &["missing field `kind`"]),
        (
            "[answers]\nlatency_s = \"slow\"",
            &["script.toml:2:13", "[low, high]"],
        ),
        ("[answers]\nlatency_s = [3, 1]", &["answers.latency_s"]),
        ("[answers]\ntext = \"ecko\"", &["script.toml:2:8", "echo"]),
        ("[limits]\nconcurrency = 0", &["limits.concurrency"]),
        ("[limits]\nburst_s = 0", &["limits.burst_s"]),
        (
            "[limits]\nchanges = [{at_s = 2, factor = 1}, {at_s = 1, factor = 1}]",
            &["limits.changes"],
        ),
        (
            "[[faults]]\nkind = \"reset\"\nshare = 2",
            &["faults[0].share"],
        ),
        (
            "[[faults]]\nkind = \"reset\"\nheaders = {x = \"a\\r\\nb\"}",
            &["faults[0].headers"],
        ),
        ("[batch]\nclock = -1", &["batch.clock"]),
        (
            "[answers]\nwords = 1",
            &["tests/mock/example.toml documents"],
        ),
    ] {
        let error = Script::parse(Path::new("script.toml"), text).unwrap_err();
        let message = format!("{error:#}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in: {message:?}");
        }
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
    let error = Script::load(Path::new("/nowhere.toml")).unwrap_err();
    assert!(error.to_string().contains("/nowhere.toml"), "{error}");
}
