//! The password in the Redis address is in no output, log or file of the binary.

use std::fs;
use std::path::Path;
use std::process::Command;

use distill::mock::script::Script;

use super::server::{Redis, free_port};

const PASSWORD: &str = "canary-in-the-mine";

/// Runs a verb with trace logs, and checks its output for the password. Returns the exit status and the output.
fn distill(dir: &Path, arguments: &[&str], url: &str) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(arguments)
        .args(["-c", "run.toml"])
        .current_dir(dir)
        .env("DISTILL_LIMITS_SHARED", url)
        .env("DISTILL_LOG", "trace")
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap();
    let mut printed = String::from_utf8_lossy(&output.stdout).into_owned();
    printed.push_str(&String::from_utf8_lossy(&output.stderr));
    assert!(!printed.contains(PASSWORD), "{arguments:?}: {printed}");
    (output.status.code(), printed)
}

/// Checks that no file below `dir` contains the password.
fn assert_files_clean(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            assert_files_clean(&path);
        } else {
            let bytes = fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            assert!(!text.contains(PASSWORD), "{}", path.display());
        }
    }
}

#[test]
fn redis_password_is_in_no_output() {
    let script = Script::parse("mock.toml".as_ref(), "").unwrap();
    let teacher = distill::mock::server::start(script, [127, 0, 0, 1].into(), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("prompts.txt"), "one\ntwo\nthree\n").unwrap();
    let config = format!(
        "[teacher]\nbase_url = \"{}\"\nmodel = \"mock\"\napi_key_env = \"\"\n\
         [prompts]\nsource = \"prompts.txt\"\n[sampling]\ntop_logprobs = 0\n\
         [limits]\nrequests_per_minute = 6000\n[retry]\nmax_outage_s = 0.3\n",
        teacher.base_url()
    );
    fs::write(dir.join("run.toml"), config).unwrap();

    let redis = Redis::with_password(Some(PASSWORD));
    let url = redis.url();
    for show in [&["config", "show"][..], &["config", "show", "--json"]] {
        let (status, printed) = distill(dir, show, &url);
        assert_eq!(status, Some(0), "{printed}");
        let without_password = url.replace(&format!(":{PASSWORD}@"), "");
        assert!(printed.contains(&without_password), "{printed}");
    }
    let unreachable = format!("redis://user:{PASSWORD}@127.0.0.1:{}", free_port());
    let wrong_password = url.replace(PASSWORD, &format!("{PASSWORD}2"));
    for (url, expected_status) in [
        (unreachable.as_str(), 1),
        (wrong_password.as_str(), 1),
        (PASSWORD, 2),
        // This harvest comes last, because it answers all prompts.
        (url.as_str(), 0),
    ] {
        let (status, printed) = distill(dir, &["harvest"], url);
        assert_eq!(status, Some(expected_status), "{printed}");
    }
    assert_files_clean(dir);
}
