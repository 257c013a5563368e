//! The API key is in no output, log or file, although servers repeat it in their replies.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use distill::mock::script::Script;
use distill::mock::server::MockServer;
use serde_json::json;

use super::matrix::{Always, FAULTS};
use crate::fault_server::{FaultServer, Reaction};

const VARIABLE: &str = "CANARY_KEY";
const KEY: &str = "sk-canary+/=0123456789abcdefghijklmnop";

/// Returns the key in plain text, URL-encoded, and in base64 at each offset within a longer text.
fn encoded_keys() -> Vec<String> {
    let mut encoded_keys = vec![
        KEY.to_string(),
        KEY.replace('+', "%2B")
            .replace('/', "%2F")
            .replace('=', "%3D"),
    ];
    encoded_keys.extend((0..3).map(|shift| {
        let text = STANDARD_NO_PAD.encode(format!("{}{KEY}", &"xxx"[..shift]));
        // Leave out the characters that depend on the neighbouring bytes.
        text[2 * shift..text.len() - 2].to_string()
    }));
    encoded_keys
}

#[track_caller]
fn assert_clean(place: &str, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for encoded_key in encoded_keys() {
        if let Some(start) = text.find(&encoded_key) {
            let reversed: String = text[..start].chars().rev().take(200).collect();
            let before: String = reversed.chars().rev().collect();
            panic!("{place} contains the key as {encoded_key}, after: {before}");
        }
    }
}

/// Checks every file below `dir`.
fn assert_files_clean(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            assert_files_clean(&path)
        } else {
            assert_clean(path.to_str().unwrap(), &fs::read(&path).unwrap())
        }
    }
}

/// Starts a mock teacher that requires the key.
fn teacher(script: &str) -> MockServer {
    let script = format!("key = \"{KEY}\"\n{script}");
    let script = Script::parse("mock.toml".as_ref(), &script).unwrap();
    distill::mock::server::start(script, [127, 0, 0, 1].into(), 0).unwrap()
}

/// Returns the script lines of a fault with the key in its headers and, if it is an error, in its body.
fn fault(kind: &str, conditions: &str) -> String {
    let is_error = ["http", "html", "insufficient", "redirect", "error"]
        .iter()
        .any(|start| kind.starts_with(start));
    // An exhausted quota is recognised by its code.
    let code = match kind {
        "insufficient_quota" => kind,
        _ => KEY,
    };
    let body = if is_error {
        format!(
            "body = '''{{\"error\":{{\"message\":\"Incorrect API key provided: {KEY}\",\"code\":\"{code}\"}}}}'''\n"
        )
    } else {
        String::new()
    };
    format!(
        "[[faults]]\nkind = \"{kind}\"\n{conditions}\n{body}\
         headers = {{ \"www-authenticate\" = \"Bearer {KEY}\", \"x-request-id\" = \"{KEY}\" }}\n"
    )
}

/// Creates a folder with a config and a number of prompts. `more` is appended to the section `[retry]` of the config.
fn folder(base_url: &str, prompts: usize, more: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = (0..prompts).map(|n| format!("number-{n:03}\n")).collect();
    fs::write(dir.path().join("prompts.txt"), lines).unwrap();
    let config = format!(
        "run_dir = \"run\"\n\
         [teacher]\nbase_url = \"{base_url}\"\nmodel = \"mock\"\napi_key_env = \"{VARIABLE}\"\ntimeout_s = 0.5\n\
         [prompts]\nsource = \"prompts.txt\"\n\
         [sampling]\nmax_tokens = 32\ntop_logprobs = 0\n\
         [retry]\nbase_s = 0.01\nmax_s = 0.02\n{more}"
    );
    fs::write(dir.path().join("run.toml"), config).unwrap();
    dir
}

/// Runs a verb with trace logs, and checks its output and files for the key.
fn run(dir: &Path, arguments: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(arguments)
        .args(["-c", "run.toml"])
        .current_dir(dir)
        .env(VARIABLE, KEY)
        .env("DISTILL_LOG", "trace")
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap();
    assert_clean(&format!("{arguments:?}: stdout"), &output.stdout);
    assert_clean(&format!("{arguments:?}: stderr"), &output.stderr);
    assert_files_clean(dir);
    output
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn api_key_is_in_no_output_under_faults() {
    let answers = format!("[answers]\ntext = {{ fixed = \"your key is {KEY} I think\" }}\n");
    let (mut stopping, mut passing) = (BTreeSet::new(), BTreeSet::new());
    for (lines, always) in FAULTS {
        let kind = lines.split('"').nth(1).unwrap();
        match always {
            Always::Stops(..) => stopping.insert(kind),
            _ => passing.insert(kind),
        };
    }

    // Faults that do not stop a run: each occurs twice, at a row of its own.
    let script: String = passing
        .iter()
        .enumerate()
        .map(|(n, kind)| fault(kind, &format!("matching = \"number-{n:03}\"\nfirst = 2")))
        .collect();
    let server = teacher(&format!("{answers}{script}"));
    let dir = folder(&server.base_url(), passing.len() + 5, "");
    let dir = dir.path();
    run(dir, &["probe"]);
    let output = run(dir, &["harvest"]);
    for arguments in [
        &["harvest", "--dry-run"][..],
        &["cache", "show"],
        &["cache", "stats"],
        &["config", "show"],
    ] {
        let output = run(dir, arguments);
        assert!(output.status.success(), "{}", errors(&output));
    }
    let cached = fs::read_to_string(dir.join("run/cache/responses.jsonl"))
        .unwrap_or_else(|_| panic!("nothing was recorded: {}", errors(&output)));
    assert!(
        cached.contains("your key is [key] I think"),
        "the teacher does not repeat the key"
    );

    // Faults that stop a run.
    for kind in stopping {
        let server = teacher(&format!("{answers}{}", fault(kind, "")));
        let dir = folder(&server.base_url(), 3, "");
        let output = run(dir.path(), &["harvest"]);
        assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
        if kind != "redirect" {
            assert!(errors(&output).contains("[key]"), "{}", errors(&output));
        }
    }

    // In batch mode, the result files repeat the key.
    let script = fault("http 500", "path = \"/content\"\nfirst = 1");
    let server = teacher(&format!(
        "{answers}{script}[batch]\nclock = 86400.0\nerror_rows = 2\n"
    ));
    let more = "[schedule]\nmode = \"batch\"\n[batch]\npoll_s = 0.05\n";
    let dir = folder(&server.base_url(), 8, more);
    let output = run(dir.path(), &["harvest"]);
    let cached = fs::read_to_string(dir.path().join("run/cache/responses.jsonl"))
        .unwrap_or_else(|_| panic!("nothing was recorded: {}", errors(&output)));
    assert!(cached.contains("your key is [key] I think"), "{cached}");

    // A wrong key.
    let server = teacher("");
    let dir = folder(&server.base_url(), 1, "");
    fs::write(
        dir.path().join("prompts.txt"),
        "a prompt\nand another one\n",
    )
    .unwrap();
    let other_key = KEY.replace("canary", "finch_");
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["harvest", "-c", "run.toml"])
        .current_dir(dir.path())
        .env(VARIABLE, &other_key)
        .env("DISTILL_LOG", "trace")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains(VARIABLE) && !errors(&output).contains(&other_key));
}

/// Returns replies that contain the key in several encodings and places.
fn replies_with_encoded_key() -> Vec<Reaction> {
    let escaped: String = KEY.bytes().map(|b| format!("\\u{b:04x}")).collect();
    let partly_escaped = KEY.replacen('c', "\\u0063", 1);
    let twice_escaped = KEY.replace('a', "\\\\u0061");
    let url_encoded: String = KEY.bytes().map(|b| format!("%{b:02X}")).collect();
    let base64 = STANDARD_NO_PAD.encode(format!("Bearer {KEY}"));
    let mut reactions = Vec::new();
    for key in [
        KEY,
        &escaped,
        &partly_escaped,
        &twice_escaped,
        &url_encoded,
        &base64,
    ] {
        let error = format!(r#"{{"error":{{"message":"no: {key}"}}}}"#);
        let answer = format!(
            r#"{{"choices":[{{"message":{{"content":"it is {key}"}},"finish_reason":"stop"}}],"odd":"{key}","usage":{{"prompt_tokens":1,"completion_tokens":9}}}}"#
        );
        let half = format!(r#"{{"choices":[{{"message":{{"content":"it is {key}"#);
        for (status, body) in [
            (200, &answer),
            (400, &error),
            (401, &error),
            (500, &error),
            (200, &half),
            (200, &error),
        ] {
            reactions.push(Reaction::Reply(
                status,
                Vec::new(),
                body.clone().into_bytes(),
            ));
        }
        if !key.contains('\\') {
            let location = vec![("location", format!("http://elsewhere/?key={key}"))];
            reactions.push(Reaction::Reply(302, location, Vec::new()));
        }
    }
    // A stream whose events split the key.
    let delta = |text: &str| {
        let delta = json!({"choices": [{"index": 0, "delta": {"content": text}}]});
        format!("data: {delta}\n\n")
    };
    let stream = format!(
        "{}{}data: {}\n\n",
        delta(&KEY[..15]),
        delta(&KEY[15..]),
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    );
    reactions.push(Reaction::Reply(200, Vec::new(), stream.into_bytes()));
    reactions
}

/// Decodes `\u` escapes of JSON.
fn unescaped(text: &str) -> String {
    let mut parts = text.split("\\u");
    let mut plain = parts.next().unwrap().to_string();
    for part in parts {
        match part.get(..4).map(|digits| u32::from_str_radix(digits, 16)) {
            Some(Ok(code)) => {
                plain.push(char::from_u32(code).unwrap_or('?'));
                plain.push_str(&part[4..]);
            }
            _ => plain.push_str(part),
        }
    }
    plain
}

#[tokio::test(flavor = "multi_thread")]
async fn api_key_in_any_encoding_is_in_no_output() {
    for reaction in replies_with_encoded_key() {
        let context = format!("{reaction:?}");
        let server = FaultServer::start(move |_| reaction.clone()).await;
        let dir = folder(&server.base_url, 2, "max_attempts = 2\n");
        let path = dir.path().to_owned();
        let output = tokio::task::spawn_blocking(move || run(&path, &["harvest"]));
        let output = output.await.unwrap();
        let mut texts = vec![errors(&output)];
        for name in ["cache/responses.jsonl", "failures.jsonl", "summary.json"] {
            texts.push(fs::read_to_string(dir.path().join("run").join(name)).unwrap_or_default());
        }
        let is_shown = texts.iter().any(|text| text.contains("[key]"));
        // Half of an answer is not shown.
        let is_half = texts.iter().any(|text| text.contains("ends early"));
        assert!(is_shown || is_half, "{context}: {texts:?}");
        for text in texts {
            let twice_unescaped = unescaped(&unescaped(&text.replace("\\\\", "\\")));
            assert_clean(&context, twice_unescaped.as_bytes());
        }
    }
}

#[test]
fn api_key_in_wrong_config_field_is_not_shown() {
    let dir = folder("http://127.0.0.1:9/v1", 1, "");
    let config = fs::read_to_string(dir.path().join("run.toml")).unwrap();
    let key = "sk-canary-0123456789abcdefghijklmnop";
    // Key of the config whose line is replaced, and the new line.
    let changes = [
        ("api_key_env", format!("api_key_env = \"{key}\"")),
        ("api_key_env", format!("api_key_env = {key}")),
        ("api_key_env", format!("api_key = \"{key}\"")),
        (
            "api_key_env",
            format!("headers = {{ x-api-key = \"{key}\" }}"),
        ),
        ("api_key_env", format!("query = {{ key = \"{key}\" }}")),
        (
            "base_url",
            format!("base_url = \"https://127.0.0.1:9/{key}/v1\""),
        ),
        (
            "base_url",
            format!("base_url = \"https://127.0.0.1:9/v1?key={key}\""),
        ),
        ("timeout_s", format!("timeout_s = \"{key}\"")),
    ];
    for (config_key, line) in changes {
        let lines = config.lines().map(|old| {
            if old.starts_with(config_key) {
                line.as_str()
            } else {
                old
            }
        });
        let changed: Vec<&str> = lines.collect();
        fs::write(dir.path().join("run.toml"), changed.join("\n")).unwrap();
        for verb in [
            &["harvest"][..],
            &["harvest", "--dry-run"],
            &["config", "show"],
        ] {
            let output = Command::new(env!("CARGO_BIN_EXE_distill"))
                .args(verb)
                .args(["-c", "run.toml"])
                .current_dir(dir.path())
                .env("DISTILL_LOG", "trace")
                .output()
                .unwrap();
            assert_eq!(output.status.code(), Some(2), "{line}: {}", errors(&output));
            let shown = [&output.stdout[..], &output.stderr].concat();
            let shown = String::from_utf8_lossy(&shown);
            assert!(!shown.contains(key), "{line}: {shown}");
        }
    }
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["harvest", "--set", &format!("teacher.api_key={key}")])
        .output()
        .unwrap();
    assert!(!errors(&output).contains(key), "{}", errors(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn api_key_is_removed_from_logprobs() {
    let token = |text: &str| {
        json!({"token": text, "logprob": -0.5, "bytes": text.as_bytes(), "top_logprobs": [
            {"token": text, "logprob": -0.5, "bytes": text.as_bytes()}]})
    };
    let one_token = [token("it is "), token(KEY)];
    let pieces: Vec<_> = KEY
        .as_bytes()
        .chunks(4)
        .map(|piece| token(std::str::from_utf8(piece).unwrap()))
        .collect();
    let pieces = [&[token("it is ")], &pieces[..]].concat();
    for content in [one_token.to_vec(), pieces] {
        let body = json!({"choices": [{"message": {"content": format!("it is {KEY}")}, "finish_reason": "stop",
            "logprobs": {"content": content}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}});
        let server = FaultServer::start(move |_| {
            Reaction::Reply(200, Vec::new(), body.to_string().into_bytes())
        })
        .await;
        let dir = folder(&server.base_url, 2, "");
        let path = dir.path().to_owned();
        let output = tokio::task::spawn_blocking(move || run(&path, &["harvest"]));
        assert_eq!(output.await.unwrap().status.code(), Some(0));
        let cached = fs::read_to_string(dir.path().join("run/cache/responses.jsonl")).unwrap();
        assert!(
            cached.contains("it is [key]") && cached.contains("the answer held the key"),
            "{cached}"
        );
        assert!(!cached.contains(&KEY[..4]), "{cached}");
    }
}
