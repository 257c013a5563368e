//! The config file: its example, the precedence of its sources, and the settings that checkpoints store or teachers
//! inherit.

mod errors;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use distill::config::load::parse;
use distill::config::{Config, load};
use distill::exit::Exit;
use serde_json::json;

const EXAMPLE: &str = include_str!("../../../config.example.toml");

/// Returns all keys of a config as `section.key`.
fn keys(config: &Config) -> BTreeSet<String> {
    let json = serde_json::to_value(config).unwrap();
    let mut keys = BTreeSet::new();
    for (section, value) in json.as_object().unwrap() {
        match value.as_object() {
            Some(fields) => keys.extend(fields.keys().map(|key| format!("{section}.{key}"))),
            None => {
                keys.insert(section.clone());
            }
        }
    }
    keys
}

/// Returns `section.key` of every line that sets a value.
fn keys_in(text: &str) -> BTreeSet<String> {
    let mut section = String::new();
    let mut keys = BTreeSet::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| is_key(key)) {
            keys.insert(format!("{section}{key}"));
        }
    }
    keys
}

/// Returns the example with its optional keys set: `# key = value` becomes `key = value`.
fn uncommented() -> String {
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting)
                if setting
                    .split_once(" = ")
                    .is_some_and(|(key, _)| is_key(key)) =>
            {
                setting
            }
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

fn is_key(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[test]
fn example_config_equals_defaults_and_has_every_key() {
    assert_eq!(parse(Path::new("x"), EXAMPLE).unwrap(), Config::default());
    let text = uncommented();
    let config = parse(Path::new("x"), &text).unwrap();
    assert_eq!(keys_in(&text), keys(&config));
    // An optional key that the example lacks would be null.
    let json = serde_json::to_string(&config).unwrap();
    assert!(!json.contains("null"), "{json}");
}

/// Loads a config file `run.toml` with this text, with environment variables and `--set` flags.
fn load_text(text: &str, environment: &[(&str, &str)], flags: &[&str]) -> anyhow::Result<Config> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let environment = environment
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let flags: Vec<String> = flags.iter().map(|flag| flag.to_string()).collect();
    load(&path, environment, &flags).map(|loaded| loaded.config)
}

#[test]
fn config_precedence_is_flag_environment_file_default() {
    let file = "[train]\nsteps = 1\nseed = 1\nbatch_size = 7";
    let environment = [
        ("DISTILL_TRAIN_STEPS", "2"),
        ("DISTILL_TRAIN_SEED", "2"),
        ("PATH", "x"),
    ];
    let flags = [
        "train.steps=3",
        "teacher.model=gpt-x",
        "data.keep_finish_reasons=[\"stop\"]",
    ];
    let config = load_text(file, &environment, &flags).unwrap();
    assert_eq!(config.train.steps, Some(3));
    assert_eq!(config.train.seed, 2);
    assert_eq!(config.train.batch_size, 7);
    assert_eq!(
        config.train.micro_batch_size,
        Config::default().train.micro_batch_size
    );
    assert_eq!(config.teacher.model, "gpt-x");
    assert_eq!(config.data.keep_finish_reasons, ["stop"]);
}

#[test]
fn config_paths_are_relative_to_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(
        &path,
        "[prompts]\nsource = \"a/p.txt\"\ntemplate = \"/t.toml\"",
    )
    .unwrap();
    let config = load(&path, std::iter::empty(), &[]).unwrap().config;
    assert_eq!(config.prompts.source, dir.path().join("a/p.txt"));
    assert_eq!(
        config.prompts.template.as_deref(),
        Some(Path::new("/t.toml"))
    );
    assert_eq!(config.run_dir, dir.path().join("run"));
}

#[test]
fn log_variable_is_not_a_setting() {
    assert!(load_text("", &[("DISTILL_LOG", "debug")], &[]).is_ok());
}

/// Checkpoints store a hash of `checkpoint_inputs` and the text of `example_settings`. With another name or order of
/// the keys, checkpoints of an earlier version would be refused, or changes would be reported for equal settings.
#[test]
fn settings_in_checkpoints_keep_names_and_order() {
    let config = Config::default();
    let stored = [
        ("checkpoint_inputs", config.checkpoint_inputs(100)),
        ("example_settings", config.example_settings()),
    ];
    for (name, value) in stored {
        let path = format!("{}/tests/it/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(format!("{value:#}\n"), golden, "{name}");
    }
}

#[test]
fn checkpoint_inputs_name_the_teacher_that_scores_answers() {
    let on_policy = "[train]\non_policy = true\n[on_policy]\njudge = \"prompt_logprobs\"\n";
    let judge = |teacher: &str| {
        let config = load_text(&format!("{on_policy}{teacher}"), &[], &[]).unwrap();
        config.checkpoint_inputs(100)["judge"].clone()
    };
    let address = "base_url = \"http://localhost:1/v1\"";
    let section = judge(&format!("[teacher]\n{address}\nmodel = \"a\""));
    assert_eq!(section, json!(["http://localhost:1/v1", "a"]));
    let entry = |model: &str| judge(&format!("[[teachers]]\n{address}\nmodel = \"{model}\""));
    assert_eq!(entry("a"), section);
    assert_eq!(entry("b"), json!(["http://localhost:1/v1", "b"]));
}

#[test]
fn value_that_is_not_utf_8_is_an_error_only_in_a_variable_of_a_setting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, "").unwrap();
    let load_with = |name: &str| {
        let value = OsString::from_vec(b"\xff".to_vec());
        load(&path, [(name.into(), value)].into_iter(), &[])
    };
    assert!(load_with("LS_COLORS").is_ok());
    let error = load_with("DISTILL_TEACHER_MODEL").unwrap_err();
    let expected = "the environment variable DISTILL_TEACHER_MODEL is not valid UTF-8";
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(Exit::code_of(&error), 2);
}

#[test]
fn shared_limits_need_the_redis_feature_and_a_limit() {
    let address = "redis://user:secret@host:1/0";
    let error_with = |keys: &str| {
        let text = format!("[limits]\nshared = \"{address}\"\n{keys}");
        let error = load_text(&text, &[], &[]).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error}");
        error.to_string()
    };
    let missing_feature = "this build cannot share limits: install with `--features redis`";
    if !cfg!(feature = "redis") {
        assert!(error_with("requests_per_minute = 1").ends_with(missing_feature));
        return;
    }
    assert!(error_with("").contains("no limit to share"));
    for limit in [
        "requests_per_minute",
        "tokens_per_minute",
        "requests_per_day",
    ] {
        let text = format!("[limits]\nshared = \"{address}\"\n{limit} = 1");
        let config = load_text(&text, &[], &[]).unwrap();
        assert_eq!(
            serde_json::to_value(&config.limits).unwrap()["shared"],
            "redis://host:1/0"
        );
        assert!(!format!("{config:?}").contains("secret"));
    }
    // Error messages do not quote lines of the file, which may contain a password.
    let syntax_error = format!("[limits]\nshared = {address}");
    for text in [
        syntax_error.as_str(),
        "[limits]\nshraed = \"redis://:secret@host\"",
    ] {
        let error = load_text(text, &[], &[]).unwrap_err();
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}

#[test]
fn teacher_entries_inherit_keys_from_the_sections() {
    let text = r#"
        [teacher]
        base_url = "http://localhost:1/v1"
        api_key_env = ""
        [sampling]
        max_tokens = 99
        [limits]
        requests_per_minute = 10
        concurrency = 3
        [[teachers]]
        model = "a"
        limits = { requests_per_minute = 500 }
        price = { input = 1.0, output = 2.0 }
        [[teachers]]
        name = "second"
        model = "a"
        base_url = "http://localhost:2/v1"
        share = 2.0
        sampling = { temperature = 0.5 }
    "#;
    let endpoints = load_text(text, &[], &[]).unwrap().endpoints();
    let [first, second] = &endpoints[..] else {
        panic!("{endpoints:?}")
    };
    assert_eq!(
        (first.teacher.label(), second.teacher.label()),
        ("a", "second")
    );
    assert_eq!(first.teacher.base_url, "http://localhost:1/v1");
    assert_eq!(second.teacher.base_url, "http://localhost:2/v1");
    assert_eq!(
        (
            first.limits.requests_per_minute,
            first.limits.concurrency,
            second.limits.requests_per_minute
        ),
        (Some(500), 3, Some(10))
    );
    assert_eq!((first.price.output, second.price.output), (Some(2.0), None));
    assert_eq!(
        (first.sampling.max_tokens, second.sampling.max_tokens),
        (99, 99)
    );
    assert_eq!(second.sampling.temperature, Some(0.5));

    let single_teacher = load_text("[teacher]\nmodel = \"x\"", &[], &[]).unwrap();
    assert_eq!(single_teacher.endpoints().len(), 1);
}
