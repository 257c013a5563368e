//! Chat templates of real models, and hostile ones.

use std::process::Command;
use std::time::{Duration, Instant};

use distill::tokenizer::chat_template::{
    ChatTemplate, RenderedSpan, TemplateClock, with_arguments,
};
use serde_json::json;

use super::{ask, golden, messages};

/// Environment variable that is set in the child process of `hostile_templates_fail_within_limits`.
const IN_CHILD: &str = "DISTILL_TEST_IN_CHILD";

#[test]
fn rendered_templates_match_transformers() {
    let golden = golden("templates.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 80);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let template = golden["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(template, "<s>", "</s>");
        let messages = messages(&case["messages"]);
        let prompt = case["add_generation_prompt"] == true;
        let text = template
            .render_text(&messages, prompt)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(text, case["text"].as_str().unwrap(), "{name}");
        // The concatenated spans equal the text. A template that changes contents in an unsupported way is an error.
        match template.render(&messages, prompt) {
            Ok(spans) => {
                let joined: String = spans
                    .iter()
                    .map(|span| match span {
                        RenderedSpan::Template(text) | RenderedSpan::Content { text, .. } => {
                            text.as_str()
                        }
                    })
                    .collect();
                assert_eq!(joined, text, "{name}");
            }
            Err(e) => {
                assert!(
                    e.to_string()
                        .contains("other than by stripping white space"),
                    "{name}: {e}"
                );
                let has_reasoning = text.contains("Because") || text.contains("So.");
                assert!(
                    ["tojson", "methods"].contains(&name) || has_reasoning,
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn template_text_and_content_are_separate_spans() {
    let template = ChatTemplate::new(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}",
        "",
        "",
    );
    let content = |message, text: &str| RenderedSpan::Content {
        message,
        text: text.into(),
    };
    let text = |text: &str| RenderedSpan::Template(text.into());
    assert_eq!(
        template.render(&ask(" <end> ", "user"), false).unwrap(),
        [
            text("<user>"),
            content(0, "<end>"),
            text("<end><assistant>"),
            content(1, "user"),
            text("<end>"),
        ]
    );
    let shouting = ChatTemplate::new("{{ messages[0].content | upper }}", "", "");
    let error = shouting.render(&ask("quiet", ""), false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("other than by stripping white space"),
        "{error}"
    );
    let refusing = ChatTemplate::new("{{ raise_exception('only user first') }}", "", "");
    let error = refusing.render(&ask("", ""), false).unwrap_err();
    assert!(error.to_string().contains("only user first"), "{error}");
}

/// The expected texts are the output of jinja2.
#[test]
fn string_methods_and_tests_match_jinja2() {
    for (source, expected) in [
        ("{{ tools is iterable }}", "False"),
        (
            "{{ none is iterable }} {{ 1 is iterable }} {{ nothing is iterable }}",
            "False False True",
        ),
        (
            "{{ 'a' is iterable }} {{ 'a' is sequence }} {{ messages[0] is sequence }}",
            "True True True",
        ),
        (
            "{{ messages is sequence }} {{ 1 is sequence }}",
            "True False",
        ),
        (
            "{% if tools is iterable and tools | length > 0 %}T{% else %}F{% endif %}",
            "F",
        ),
        (
            "{{ 'a-b-c'.rsplit('-', 1)[0] }} {{ 'a b'.rsplit()[1] }}",
            "a-b b",
        ),
        (
            "{{ 'a-b-c'.partition('-')[2] }} {{ 'a-b-c'.rpartition('-')[0] }}",
            "b-c a-b",
        ),
        (
            "{{ 'a'.partition('-')[0] }} {{ 'a'.rpartition('-')[2] }}",
            "a a",
        ),
        (
            "{{ 'xab'.removeprefix('x') }} {{ 'abx'.removesuffix('x') }}",
            "ab ab",
        ),
        ("{{ 'äbc'.index('c') }} {{ 'aB'.swapcase() }}", "2 Ab"),
        (
            "{{ bos_token }} {{ pad_token is defined }} {{ unk_token }}",
            "<s> False <unk>",
        ),
    ] {
        let tokens = [("bos_token", Some("<s>")), ("unk_token", Some("<unk>"))];
        let template = ChatTemplate::with_tokens(source, tokens);
        let text = template.render_text(&ask("a", "b"), false).unwrap();
        assert_eq!(text, expected, "{source}");
    }
    let missing = ChatTemplate::new("{{ 'a'.index('b') }}", "", "");
    let error = missing.render_text(&ask("a", "b"), false).unwrap_err();
    assert!(error.to_string().contains("substring not found"), "{error}");
}

#[test]
fn strftime_now_returns_the_configured_date() {
    let mut template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", "", "");
    let error = template.render_text(&[], true).unwrap_err().to_string();
    assert!(error.contains("student.template_date"), "{error}");
    template.set_date(TemplateClock::Fixed(jiff::civil::date(2026, 1, 31).into()));
    assert_eq!(template.render_text(&[], true).unwrap(), "31 Jan 2026");
}

#[test]
fn template_args_become_default_values() {
    let arguments = json!({"thinks": false, "name": "a \"b\"\n", "list": [1, null, {"k": {}}]});
    let arguments = serde_json::from_value(arguments).unwrap();
    let source = "{{ thinks }} {{ name }}{{ list[2].k | length }} {{ list[1] is none }}";
    let text = with_arguments(source, &arguments).unwrap();
    let template = ChatTemplate::new(&text, "", "");
    assert_eq!(
        template.render_text(&[], true).unwrap(),
        "False a \"b\"\n0 True"
    );
    for name in ["a b", "", "1a", "tools", "bos_token", "thinkz"] {
        let wrong = serde_json::from_value(json!({ name: 1 })).unwrap();
        let error = with_arguments("{{ thinks }}", &wrong)
            .unwrap_err()
            .to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn hostile_templates_fail_within_limits() {
    // Peak memory is that of the process, so this test runs in a process of its own.
    if std::env::var_os(IN_CHILD).is_none() {
        let name = "data::chat_template::hostile_templates_fail_within_limits";
        let output = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(IN_CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        assert!(text.contains("1 passed"), "{text}");
        return;
    }
    let cases = [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{% for k in range(1000) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 99999999 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = '%s%s' | format(ns.s, ns.s) %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
        "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('ab', 60) }}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(9) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(9) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(9) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(9) %}{% set ns.s = range(1000) | join(ns.s) %}{% endfor %}",
        "{% set s = 'a' * 60000 %}{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% for j in range(1000) %}{% set ns.l = [ns.l, s[1:]] %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 60000 %}{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% for j in range(1000) %}{% set ns.l = [ns.l, s | trim] %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 60000 %}{% set l = [s] * 1000 %}{% set m = [s[:1] ~ s[1:]] * 1000 %}{% for i in range(1000) %}{{ l == m }}{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{{ range(1000) | list | length }}{% endfor %}{% endfor %}",
        "{{ 'a' | center(999999999) }}",
        "{{ [] | batch(999999999, 'x') | list }}",
        "{{ messages | tojson(indent=999999999) }}",
        "{{ [*range(1000)] }}",
    ];
    for source in cases.iter().map(|source| source.to_string()).chain([
        format!("{}1{}", "{{ (".repeat(5000), ") }}".repeat(5000)),
        format!("{{{{ {}1 }}}}", "-".repeat(100_000)),
        format!("{{{{ x{} }}}}", " + x".repeat(20_000)),
        format!("{{{{ 1{} }}}}{{{{ x.y.z }}}}", " + 1".repeat(490)),
        format!("{{% if x %}}{}{{% endif %}}{{{{ raise_exception('end') }}}}", "{% elif x %}".repeat(500)),
        format!("{{{{ x{} }}}}", "|trim".repeat(20_000)),
        format!("{}{}", "{% if x %}".repeat(10_000), "{% endif %}".repeat(10_000)),
        format!("{{% if x %}}{}{{% endif %}}{{{{ raise_exception('end') }}}}", "{% elif x %}".repeat(20_000)),
        format!("{{% for i in range(1000) %}}{{% for j in range(1000) %}}{}{{% endfor %}}{{% endfor %}}", "x".repeat(10_000)),
    ]) {
        let before = peak_memory();
        let start = Instant::now();
        let template = ChatTemplate::new(&source, "", "");
        let error = template.render(&ask("a", "b"), false).unwrap_err().to_string();
        let short: String = source.chars().take(120).collect();
        assert!(start.elapsed() < Duration::from_secs(5), "{short}: {:?}", start.elapsed());
        assert!(error.contains("the chat template"), "{short}: {error}");
        let grown = peak_memory().saturating_sub(before);
        assert!(grown < 64 << 20, "{short}: {grown} bytes");
    }
}

/// Returns the peak resident memory of this process in bytes, or 0 on systems other than Linux.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.trim().parse::<usize>().ok())
        .unwrap_or(0)
        << 10
}
