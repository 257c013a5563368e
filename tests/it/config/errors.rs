//! Errors of the config file, the environment and flags: their position, setting and hint.

use distill::exit::Exit;

use super::load_text;

/// A config with a mistake, and parts of the expected message.
struct ErrorCase {
    text: &'static str,
    environment: &'static [(&'static str, &'static str)],
    flags: &'static [&'static str],
    expected: &'static [&'static str],
}

impl ErrorCase {
    const NONE: ErrorCase = ErrorCase {
        text: "",
        environment: &[],
        flags: &[],
        expected: &[],
    };
}

#[test]
fn config_errors_have_a_position_and_a_hint() {
    let cases = [
        ErrorCase {
            text: "[teacher]\nmodl = \"x\"",
            expected: &["run.toml:2:1", "\"modl\"", "did you mean \"model\"?"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            text: "[teecher]\n",
            expected: &["run.toml:1:2", "did you mean \"teacher\"?"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            text: "[train]\nsteps = \"many\"",
            expected: &["run.toml:2:9", "`train.steps`: invalid type"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            text: "[loss]\nkd = \"tial\"",
            expected: &["run.toml:2:6", "tail"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            text: "[train\n",
            expected: &["run.toml:1"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            environment: &[("DISTILL_TRAIN_STEP", "3")],
            expected: &["DISTILL_TRAIN_STEP ", "DISTILL_TRAIN_STEPS"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            flags: &["train.sede=1"],
            expected: &["train.sede", "\"train.seed\""],
            ..ErrorCase::NONE
        },
        ErrorCase {
            flags: &["train.steps"],
            expected: &["section.key=value"],
            ..ErrorCase::NONE
        },
        ErrorCase {
            flags: &["steps=5"],
            expected: &["did you mean \"train.steps\"?"],
            ..ErrorCase::NONE
        },
    ];
    for case in cases {
        let error = load_text(case.text, case.environment, case.flags).unwrap_err();
        let message = format!("{error:#}");
        for part in case.expected {
            assert!(message.contains(part), "{part:?} is not in: {message:?}");
        }
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
}

/// Mistakes that can be detected without other files are reported when the config is loaded, by every command.
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
            "[lora]\nrank = 4\n[train]\nscale_parameter = true",
            "run.toml:4:19: `train.scale_parameter` does not work with `lora.rank`",
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
        assert!(
            message.contains(expected),
            "{expected:?} is not in: {message:?}"
        );
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
}

#[test]
fn numbers_out_of_their_range_are_refused_by_name() {
    for (key, values) in [
        ("data.max_length", &["0"][..]),
        ("eval.limit", &["0"]),
        ("eval.max_tokens", &["0"]),
        ("prompts.limit", &["0"]),
        ("student.rope_theta", &["nan", "inf", "0.0", "-1.0"]),
        ("train.epsilon", &["nan", "0.0", "-1.0"]),
        ("train.keep_checkpoints", &["0"]),
        ("train.max_grad_norm", &["nan", "inf", "-1.0"]),
        ("train.min_learning_rate_ratio", &["nan", "-0.1", "1.1"]),
        ("train.weight_decay", &["nan", "inf", "-0.1"]),
    ] {
        for value in values {
            let error = load_text("", &[], &[&format!("{key}={value}")]).unwrap_err();
            let message = error.to_string();
            let expected = format!("--set: `{key}` must ");
            assert!(message.starts_with(&expected), "{value}: {message}");
            assert_eq!(Exit::code_of(&error), 2);
        }
    }
    let boundaries = [
        "train.max_grad_norm=0.0",
        "train.min_learning_rate_ratio=1.0",
        "train.weight_decay=0.0",
    ];
    assert!(load_text("", &[], &boundaries).is_ok());
}

#[test]
fn mistakes_in_flags_and_variables_name_their_origin_and_setting() {
    let error = load_text("", &[], &["sampling.top_p=2.0"]).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("--set: `sampling.top_p`"), "{message}");
    for (name, value, expected) in [
        (
            "DISTILL_SCHEDULE_WINDOW",
            "25-26",
            "DISTILL_SCHEDULE_WINDOW: `schedule.window`",
        ),
        (
            "DISTILL_TRAIN_BATCH_SIZE",
            "0",
            "DISTILL_TRAIN_BATCH_SIZE: `train.batch_size`",
        ),
    ] {
        let error = load_text("", &[(name, value)], &[]).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn dates_may_be_unquoted_but_other_types_are_errors() {
    let unquoted = "[price]\nas_of = 2026-11-22\n[schedule]\ndeadline = 2026-11-23T06:30:00\n";
    let quoted =
        "[price]\nas_of = \"2026-11-22\"\n[schedule]\ndeadline = \"2026-11-23T06:30:00\"\n";
    let load = |text: &str| load_text(text, &[], &[]).unwrap();
    assert_eq!(load(unquoted).price, load(quoted).price);
    assert_eq!(load(unquoted).schedule, load(quoted).schedule);
    for value in ["5", "{ a = 1 }", "true"] {
        let error = load_text(&format!("[price]\nas_of = {value}"), &[], &[]).unwrap_err();
        assert!(error.to_string().contains("`price.as_of`: "), "{error}");
        assert!(error.to_string().contains("a string"), "{error}");
    }
}

#[test]
fn environment_variables_in_the_endpoint_are_not_expanded_on_loading() {
    // So `${GATEWAY}/v1` is not checked as a URL.
    let with_variable = "[teacher]\nbase_url = \"${GATEWAY}/v1\"\nheaders = { A = \"${B}\" }";
    load_text(with_variable, &[], &[]).unwrap();
}

#[test]
fn type_errors_of_flags_and_variables_name_the_setting() {
    let error = |environment: &[(&str, &str)], flags: &[&str]| {
        let error = load_text("", environment, flags).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2);
        error.to_string()
    };
    let flag = error(&[], &["train.steps=abc"]);
    assert!(flag.contains("--set: `train.steps` = \"abc\""), "{flag}");
    let variable = error(&[("DISTILL_TRAIN_STEPS", "-1")], &[]);
    let expected = "DISTILL_TRAIN_STEPS: `train.steps` = \"-1\"";
    assert!(variable.contains(expected), "{variable}");
}

#[test]
fn mistakes_in_teacher_entries_are_reported() {
    let same_model = "[[teachers]]\nmodel = \"a\"\n[[teachers]]\nmodel = \"a\"";
    let error = load_text(same_model, &[], &[]).unwrap_err();
    assert!(error.to_string().contains("a `name` of its own"), "{error}");
    let misspelled_key = "[[teachers]]\nmodle = \"a\"";
    let error = load_text(misspelled_key, &[], &[]).unwrap_err();
    assert!(
        error.to_string().contains("did you mean \"model\""),
        "{error}"
    );
}

#[test]
fn local_teacher_and_on_policy_settings_are_validated() {
    let config = load_text("", &[], &["teacher.local=\"model\""]).unwrap();
    assert!(config.teacher.local.unwrap().ends_with("model"));
    let on_policy = "[teacher]\nlocal = \"model\"\n[train]\non_policy = true\n";
    assert!(load_text(on_policy, &[], &[]).is_ok());
    let with_judge = "[train]\non_policy = true\n[on_policy]\njudge = \"prompt_logprobs\"\n";
    assert!(load_text(with_judge, &[], &[]).is_ok());
    for (text, expected) in [
        ("[teacher]\ncotrain = true\n", "teacher.local"),
        ("[[teachers]]\nmodel = \"a\"\nlocal = \"b\"\n", "[teacher]"),
        ("[train]\non_policy = true\n", "teacher.local"),
        (
            "[teacher]\nlocal = \"model\"\n[train]\non_policy = true\n[loss]\nkd = \"none\"\n",
            "loss.kd",
        ),
        ("[teacher]\ncotrain_rate = 0.0\n", "teacher.cotrain_rate"),
        (
            "[teacher]\nlocal = \"model\"\ncotrain = true\n[train]\nbest = \"kl\"\n",
            "train.best",
        ),
        ("[student]\nhidden_size = 64\n", "init = \"random\""),
        (
            "[student]\ninit = \"layers\"\ndecoder_layers = 2\nnum_hidden_layers = 2\n",
            "student.num_hidden_layers",
        ),
        ("[data]\ntop_logprobs = 0\n", "data.top_logprobs"),
        ("[loss]\nbeta = 1.0\n", "loss.beta"),
        ("[on_policy]\nshare = 1.5\n", "on_policy.share"),
        ("[on_policy]\njudge = \"echo\"\n", "on_policy.tokenizer"),
        (
            &format!("{with_judge}[teacher]\nlocal = \"model\"\n"),
            "without `teacher.local`",
        ),
        (
            &format!("{with_judge}[sampling]\ntop_logprobs = 0\n"),
            "sampling.top_logprobs",
        ),
        (
            &format!(
                "{with_judge}[[teachers]]\nmodel = \"a\"\n[[teachers]]\nname = \"b\"\nmodel = \"b\"\n"
            ),
            "one teacher",
        ),
    ] {
        let error = load_text(text, &[], &[]).unwrap_err();
        let message = format!("{error:#}");
        assert_eq!(Exit::code_of(&error), 2, "{message}");
        assert!(message.contains(expected), "{text:?}: {message}");
    }
}
