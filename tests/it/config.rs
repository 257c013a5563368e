//! The config file: its example, its precedence, its error messages.

use std::collections::BTreeSet;
use std::path::Path;

use distill::config::load::parse;
use distill::config::{Config, load};
use distill::exit::Exit;

const EXAMPLE: &str = include_str!("../../config.example.toml");

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

/// `section.key` of every line that sets a value.
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

/// The example with its optional keys set: `# key = value` becomes `key = value`.
fn uncommented() -> String {
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| is_key(key)) => rest,
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
    let full = uncommented();
    let parsed = parse(Path::new("x"), &full).unwrap();
    assert_eq!(keys_in(&full), keys(&parsed));
    let json = serde_json::to_string(&parsed).unwrap();
    assert!(
        !json.contains("null"),
        "an optional key lacks its example: {json}"
    );
}

fn load_text(text: &str, environment: &[(&str, &str)], flags: &[&str]) -> anyhow::Result<Config> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let environment = environment
        .iter()
        .map(|(n, v)| (n.to_string(), v.to_string()));
    let flags: Vec<String> = flags.iter().map(|f| f.to_string()).collect();
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

/// A config's text, environment and flags, and parts of the expected message.
type ErrorCase = (
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static [&'static str],
    &'static [&'static str],
);

#[test]
fn config_errors_have_a_position_and_a_hint() {
    let cases: [ErrorCase; 9] = [
        (
            "[teacher]\nmodl = \"x\"",
            &[],
            &[],
            &["run.toml:2:1", "\"modl\"", "did you mean \"model\"?"],
        ),
        (
            "[teecher]\n",
            &[],
            &[],
            &["run.toml:1:2", "did you mean \"teacher\"?"],
        ),
        (
            "[train]\nsteps = \"many\"",
            &[],
            &[],
            &["run.toml:2:9", "`train.steps`: invalid type"],
        ),
        ("[loss]\nkd = \"tial\"", &[], &[], &["run.toml:2:6", "tail"]),
        ("[train\n", &[], &[], &["run.toml:1"]),
        (
            "",
            &[("DISTILL_TRAIN_STEP", "3")],
            &[],
            &["DISTILL_TRAIN_STEP ", "DISTILL_TRAIN_STEPS"],
        ),
        (
            "",
            &[],
            &["train.sede=1"],
            &["train.sede", "\"train.seed\""],
        ),
        ("", &[], &["train.steps"], &["section.key=value"]),
        ("", &[], &["steps=5"], &["did you mean \"train.steps\"?"]),
    ];
    for (text, environment, flags, expected) in cases {
        let error = load_text(text, environment, flags).unwrap_err();
        let message = format!("{error:#}");
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
}

/// Mistakes that can be detected without other files are reported when the config is read, whatever the command.
#[test]
fn mistakes_in_values_have_a_position_and_a_key() {
    let cases = [
        (
            "[sampling]\ntop_logprobs = 21",
            "run.toml:2:16: `sampling.top_logprobs` must be at most 20",
        ),
        (
            "[sampling]\nextra = { n = 2 }",
            "run.toml:2:9: `sampling.extra` must not contain `n`",
        ),
        (
            "[schedule]\nwindow = \"25:00-26:00\"",
            "run.toml:2:10: `schedule.window`: \"25:00-26:00\" is not",
        ),
        (
            "[schedule]\nwindow = \"22:00-22:00\"",
            "run.toml:2:10: `schedule.window`: \"22:00-22:00\" is not",
        ),
        (
            "[schedule]\ndeadline = \"tomorrow\"",
            "run.toml:2:12: `schedule.deadline`: \"tomorrow\" is not",
        ),
        (
            "[schedule]\ntimezone = \"Mars\"",
            "run.toml:2:12: `schedule.timezone`: \"Mars\" is not",
        ),
        (
            "[price]\nas_of = \"2026-13-01\"",
            "run.toml:2:9: `price.as_of`: \"2026-13-01\" is not",
        ),
        (
            "[price]\ninput = -1.0",
            "run.toml:2:9: `price.input` must be finite and not negative",
        ),
        (
            "[retry]\nbase_s = -1.0",
            "run.toml:2:10: `retry.base_s`: -1 is not a valid time",
        ),
        (
            "[batch]\npoll_s = 0.0",
            "run.toml:2:10: `batch.poll_s` must be above 0",
        ),
        (
            "[teacher]\ntimeout_s = 0.0",
            "run.toml:2:13: `teacher.timeout_s` must be greater than 0",
        ),
        (
            "[teacher]\nbase_url = \"vllm:8000/v1\"",
            "run.toml:2:12: `teacher.base_url` = \"vllm:8000/v1\" has no scheme",
        ),
        (
            "[teacher]\nbase_url = \"http://vllm/v1\"",
            "run.toml:2:12: `teacher.base_url`",
        ),
        (
            "[teacher]\nheaders = { Host = \"x\" }",
            "run.toml:2:11: `teacher.headers.Host` cannot be set",
        ),
        (
            "[teacher]\nheaders = { \"a b\" = \"x\" }",
            "run.toml:2:11: `teacher.headers.a b`: \"a b\" is not a valid",
        ),
        (
            "[teacher]\nheaders = { A = \"a\\nb\" }",
            "run.toml:2:11: `teacher.headers.A` contains characters",
        ),
        (
            "[teacher]\napi_key_header = \"a b\"",
            "run.toml:2:18: `teacher.api_key_header`",
        ),
        (
            "[lora]\ntargets = [\"a\", \"(\"]",
            "run.toml:2:11: `lora.targets`: \"(\" is not a valid regular",
        ),
        (
            "[train]\nfreeze = [\"(\"]",
            "run.toml:2:10: `train.freeze`: \"(\" is not a valid regular",
        ),
        (
            "[train]\nno_decay = [\"(\"]",
            "run.toml:2:12: `train.no_decay`: \"(\" is not a valid regular",
        ),
        (
            "[train]\nbatch_size = 0",
            "run.toml:2:14: `train.batch_size`",
        ),
        (
            "[[teachers]]\nmodel = \"a\"\n[[teachers]]\nmodel = \"b\"\nsampling = { top_p = 2.0 }",
            "run.toml:5:22: `sampling.top_p` must be above 0",
        ),
        (
            "[sampling]\ntop_p = 0.5\n[teacher]\nsampling = { top_p = 2.0 }",
            "run.toml:4:22: `sampling.top_p` must be above 0",
        ),
        (
            "[sampling]\ntop_p = 0.5\n[teacher]\nsampling = { top_p = 2.0 }\n[[teachers]]\nmodel = \"a\"",
            "run.toml:4:22: `sampling.top_p` must be above 0",
        ),
        (
            "[teacher]\norganization = \"o\"\napi_key_header = \"OpenAI-Organization\"",
            "run.toml:2:16: `teacher.organization` is already the header of the key",
        ),
        (
            "[teacher]\nsampling = { top_p = 2.0 }",
            "run.toml:2:22: `sampling.top_p` must be above 0",
        ),
        (
            "[[teachers]]\nmodel = \"a\"\n[[teachers]]\nmodel = \"a\"",
            "run.toml:4:9: two teachers have the name \"a\"",
        ),
        (
            "[train]\npatience = 2",
            "run.toml:2:12: `train.patience` needs a metric",
        ),
    ];
    for (text, expected) in cases {
        let error = load_text(text, &[], &[]).unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
    let flag_error = load_text("", &[], &["sampling.top_p=2.0"]).unwrap_err();
    assert!(
        flag_error
            .to_string()
            .starts_with("--set: `sampling.top_p`"),
        "{flag_error}"
    );
    let variable = [("DISTILL_SCHEDULE_WINDOW", "25-26")];
    let variable_error = load_text("", &variable, &[]).unwrap_err().to_string();
    assert!(
        variable_error.starts_with("DISTILL_SCHEDULE_WINDOW: `schedule.window`"),
        "{variable_error}"
    );
    let variable = [("DISTILL_TRAIN_BATCH_SIZE", "0")];
    let variable_error = load_text("", &variable, &[]).unwrap_err().to_string();
    assert!(
        variable_error.starts_with("DISTILL_TRAIN_BATCH_SIZE: `train.batch_size`"),
        "{variable_error}"
    );
    let dates = "[price]\nas_of = 2026-11-22\n[schedule]\ndeadline = 2026-11-23T06:30:00\n";
    let quoted =
        "[price]\nas_of = \"2026-11-22\"\n[schedule]\ndeadline = \"2026-11-23T06:30:00\"\n";
    let load = |text: &str| load_text(text, &[], &[]).unwrap();
    assert_eq!(load(dates).price, load(quoted).price);
    assert_eq!(load(dates).schedule, load(quoted).schedule);
    for value in ["5", "{ a = 1 }", "true"] {
        let error = load_text(&format!("[price]\nas_of = {value}"), &[], &[]).unwrap_err();
        assert!(error.to_string().contains("`price.as_of`: "), "{error}");
        assert!(error.to_string().contains("a string"), "{error}");
    }
    // The value of a variable is not known before a request is sent.
    let with_variable = "[teacher]\nbase_url = \"${GATEWAY}/v1\"\nheaders = { A = \"${B}\" }";
    load_text(with_variable, &[], &[]).unwrap();
}

/// These texts are hashed into checkpoints: with another name or order, a checkpoint of an earlier version is refused.
#[test]
fn hashed_settings_keep_names_and_order() {
    let config = Config::default();
    let hashed = [
        ("checkpoint_inputs", config.checkpoint_inputs(100)),
        ("example_settings", config.example_settings()),
    ];
    for (name, value) in hashed {
        let path = format!("{}/tests/it/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(format!("{value:#}\n"), golden, "{name}");
    }
}

#[test]
fn shared_limits_need_the_redis_feature_and_a_limit() {
    let address = "redis://user:secret@host:1/0";
    let error_of = |keys: &str| {
        let text = format!("[limits]\nshared = \"{address}\"\n{keys}");
        let error = load_text(&text, &[], &[]).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error}");
        error.to_string()
    };
    let no_redis = "this build cannot share limits: install with `--features redis`";
    if !cfg!(feature = "redis") {
        assert!(error_of("requests_per_minute = 1").ends_with(no_redis));
        return;
    }
    assert!(error_of("").contains("no limit to share"));
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
    // Error messages do not quote the line of the file.
    let unquoted = format!("[limits]\nshared = {address}");
    for text in [
        unquoted.as_str(),
        "[limits]\nshraed = \"redis://:secret@host\"",
    ] {
        let error = load_text(text, &[], &[]).unwrap_err();
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}

#[test]
fn type_errors_of_flags_and_variables_name_the_setting() {
    let error = |environment: &[(&str, &str)], flags: &[&str]| {
        let error = load_text("", environment, flags).unwrap_err();
        assert_eq!(distill::exit::Exit::code_of(&error), 2);
        error.to_string()
    };
    let flag = error(&[], &["train.steps=abc"]);
    assert!(flag.contains("--set: `train.steps` = \"abc\""), "{flag}");
    let variable = error(&[("DISTILL_TRAIN_STEPS", "-1")], &[]);
    let expected = "DISTILL_TRAIN_STEPS: `train.steps` = \"-1\"";
    assert!(variable.contains(expected), "{variable}");
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

    let twice = "[[teachers]]\nmodel = \"a\"\n[[teachers]]\nmodel = \"a\"";
    let error = load_text(twice, &[], &[]).unwrap_err();
    assert!(error.to_string().contains("a `name` of its own"), "{error}");
    let typo = "[[teachers]]\nmodle = \"a\"";
    let error = load_text(typo, &[], &[]).unwrap_err();
    assert!(
        error.to_string().contains("did you mean \"model\""),
        "{error}"
    );
    let one = load_text("[teacher]\nmodel = \"x\"", &[], &[]).unwrap();
    assert_eq!(one.endpoints().len(), 1);
}

#[test]
fn local_teacher_and_on_policy_settings_are_validated() {
    let config = load_text("", &[], &["teacher.local=\"model\""]).unwrap();
    assert!(config.teacher.local.unwrap().ends_with("model"));
    let on_policy = "[teacher]\nlocal = \"model\"\n[train]\non_policy = true\n";
    assert!(load_text(on_policy, &[], &[]).is_ok());
    let asked = "[train]\non_policy = true\n[on_policy]\njudge = \"prompt_logprobs\"\n";
    assert!(load_text(asked, &[], &[]).is_ok());
    for (text, needle) in [
        ("[teacher]\ncotrain = true\n", "teacher.local"),
        ("[[teachers]]\nmodel = \"a\"\nlocal = \"b\"\n", "[teacher]"),
        ("[train]\non_policy = true\n", "teacher.local"),
        (
            "[teacher]\nlocal = \"model\"\n[train]\non_policy = true\n[loss]\nkd = \"none\"\n",
            "loss.kd",
        ),
        ("[teacher]\ncotrain_rate = 0.0\n", "teacher.cotrain_rate"),
        ("[data]\ntop_logprobs = 0\n", "data.top_logprobs"),
        ("[loss]\nbeta = 1.0\n", "loss.beta"),
        ("[on_policy]\nshare = 1.5\n", "on_policy.share"),
        ("[on_policy]\njudge = \"echo\"\n", "on_policy.tokenizer"),
        (
            &format!("{asked}[teacher]\nlocal = \"model\"\n"),
            "without `teacher.local`",
        ),
        (
            &format!("{asked}[sampling]\ntop_logprobs = 0\n"),
            "sampling.top_logprobs",
        ),
        (
            &format!(
                "{asked}[[teachers]]\nmodel = \"a\"\n[[teachers]]\nname = \"b\"\nmodel = \"b\"\n"
            ),
            "one teacher",
        ),
    ] {
        let error = load_text(text, &[], &[]).unwrap_err();
        let message = format!("{error:#}");
        assert_eq!(Exit::code_of(&error), 2, "{message}");
        assert!(message.contains(needle), "{text:?}: {message}");
    }
}
