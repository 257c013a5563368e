//! The `distill` binary: the pipeline with a tiny teacher, and the errors for bad input.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::tiny;

fn distill(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_distill"));
    command
        .args(args)
        .env_remove("OPENAI_API_KEY")
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    distill(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Checks the exit status, and that stderr contains all of `parts` and no panic.
#[track_caller]
fn assert_refused(output: &Output, status: i32, parts: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{errors}");
    for part in parts {
        assert!(
            errors.contains(part),
            "{errors:?} does not contain {part:?}"
        );
    }
    assert!(!errors.contains("panicked"), "{errors}");
}

/// Returns a stdout that is a pipe without a reader.
fn closed_stdout() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// A running `distill serve`, which is killed when dropped.
struct Teacher {
    child: Child,
    base_url: String,
}

impl Teacher {
    fn start(model: &Path) -> Self {
        let model = model.to_str().unwrap();
        let mut child = distill(&["serve", "--port", "0", "--name", "tiny", "--model", model])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let base_url = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_string();
        Self { child, base_url }
    }
}

impl Drop for Teacher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Creates a folder with a model, ten prompts and a config. Returns the folder and the path of the config.
fn run_folder(base_url: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    tiny::write_model(&model, 1, 128);
    let prompts: String = (0..10)
        .map(|i| format!("{{\"id\":{i},\"text\":\"say {i}\"}}\n"))
        .collect();
    std::fs::write(dir.path().join("prompts.jsonl"), prompts).unwrap();
    std::fs::write(dir.path().join("template.toml"), "user = \"{{ text }}!\"\n").unwrap();
    let config = format!(
        "[teacher]\nbase_url = \"{base_url}\"\nmodel = \"tiny\"\napi_key_env = \"\"\n\
         [prompts]\nsource = \"prompts.jsonl\"\ntemplate = \"template.toml\"\n\
         [sampling]\nmax_tokens = 12\nseed = 3\n\
         [retry]\nbase_s = 0.01\nmax_s = 0.02\n\
         [student]\npath = \"model\"\n\
         [data]\nvalidation_share = 0.2\nkeep_finish_reasons = [\"stop\", \"length\"]\n\
         [train]\nsteps = 3\nbatch_size = 4\ndtype = \"f32\"\n[eval]\nsource = \"prompts.jsonl\"\ntruth = \"text\"\nmax_tokens = 8\n"
    );
    let path = dir.path().join("run.toml");
    std::fs::write(&path, config).unwrap();
    let path = path.to_str().unwrap().to_string();
    (dir, path)
}

/// Trains a teacher that answers in words, with `distill train` on a file of conversations. Returns its folder.
fn trained_teacher(dir: &Path) -> std::path::PathBuf {
    tiny::write_model(dir, 5, 128);
    let rows: String = (0..40)
        .map(|i| {
            format!(
                "{{\"messages\":[{{\"role\":\"user\",\"content\":\"say {i}!\"}},\
                 {{\"role\":\"assistant\",\"content\":\"the {}\"}}]}}\n",
                ["hen", "tin"][i % 2]
            )
        })
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let config = dir.join("teacher.toml");
    std::fs::write(
        &config,
        "[data]\nsource = \"rows.jsonl\"\n[student]\ninit = \"random\"\npath = \".\"\n\
         hidden_size = 16\nintermediate_size = 32\nnum_hidden_layers = 1\n\
         num_attention_heads = 2\nnum_key_value_heads = 1\n[loss]\nkd = \"none\"\n\
         [train]\nsteps = 40\nbatch_size = 8\nlearning_rate = 2e-2\nwarmup_steps = 2\n",
    )
    .unwrap();
    stdout(&run(&["train", "-c", config.to_str().unwrap()]));
    dir.join("run/student")
}

#[test]
fn eval_compares_with_the_cotrained_teacher_and_counts_prompts_that_are_too_long() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = trained_teacher(dir.path());
    let row = serde_json::json!({
        "id": "1", "answer": "yes",
        "messages": [{"role": "user", "content": "x y z ".repeat(5000)}],
    });
    std::fs::write(dir.path().join("eval.jsonl"), format!("{row}\n")).unwrap();
    let config = dir.path().join("teacher.toml");
    let run_json = |command: &str| -> serde_json::Value {
        let output = run(&[
            "--json",
            command,
            "-c",
            config.to_str().unwrap(),
            "--set",
            "run_dir=second",
            "--set",
            &format!("teacher.local={}", teacher.display()),
            "--set",
            "teacher.cotrain=true",
            "--set",
            "loss.kd=temperature",
            "--set",
            "data.validation_share=0.3",
            "--set",
            "eval.source=eval.jsonl",
        ]);
        serde_json::from_str(&stdout(&output)).unwrap()
    };
    let trained = run_json("train");
    let report = run_json("eval");
    assert!(report["teacher"]["kl"].as_f64().unwrap() > 0.0, "{report}");
    let validation = &trained["summary"]["validation"];
    assert_eq!(report["teacher"]["kl"], validation["kl"], "{report}");
    assert_eq!(report["truth"]["too_long"], 1, "{report}");
    assert_eq!(report["truth"]["cut_off"], 0, "{report}");
}

#[test]
fn harvest_train_and_eval_from_one_config() {
    let teacher_dir = tempfile::tempdir().unwrap();
    let teacher_model = trained_teacher(teacher_dir.path());
    let teacher = Teacher::start(&teacher_model);
    let (dir, config) = run_folder(&teacher.base_url);

    let harvest = ["--json", "harvest", "-c", &config];
    let harvested: serde_json::Value = serde_json::from_str(&stdout(&run(&harvest))).unwrap();
    assert_eq!(
        (&harvested["ok"], &harvested["cached"]),
        (&10.into(), &0.into()),
        "{harvested}"
    );
    let rerun: serde_json::Value = serde_json::from_str(&stdout(&run(&harvest))).unwrap();
    assert_eq!(
        (&rerun["requests"], &rerun["cached"]),
        (&0.into(), &10.into()),
        "{rerun}"
    );

    let stats = stdout(&run(&["--json", "cache", "stats", "-c", &config]));
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["stats"]["records"], 10, "{stats}");
    assert!(stdout(&run(&["cache", "verify", "-c", &config])).contains("complete records: 10,"));
    let shown = stdout(&run(&["cache", "show", "-c", &config, "3"]));
    assert!(shown.contains("say 3!"), "{shown}");

    let trained = stdout(&run(&["--json", "train", "-c", &config]));
    let trained: serde_json::Value = serde_json::from_str(&trained).unwrap();
    let validation = &trained["summary"]["validation"];
    assert!(validation["kl"].as_f64().unwrap() > 0.0, "{trained}");
    assert!(dir.path().join("run/student/model.safetensors").exists());

    let report = stdout(&run(&["--json", "eval", "-c", &config]));
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["truth"]["rows"], 10, "{report}");
    assert_eq!(report["teacher"]["kl"], validation["kl"], "{report}");

    // The divergence of the teacher from its own answers is almost 0, because HTTP and the cache preserve its logprobs.
    let model = format!("eval.model={}", teacher_model.display());
    let report = stdout(&run(&["--json", "eval", "-c", &config, "--set", &model]));
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(
        report["teacher"]["kl"].as_f64().unwrap().abs() < 1e-5,
        "{report}"
    );

    let student = dir.path().join("run/student");
    let answer = stdout(&run(&[
        "--json",
        "generate",
        "--model",
        student.to_str().unwrap(),
        "say",
    ]));
    assert!(answer.contains("\"finish_reason\""), "{answer}");
}

#[test]
fn invalid_input_is_refused_with_a_hint() {
    let (dir, config) = run_folder("http://127.0.0.1:9/v1");
    let set = |value: &str| run(&["harvest", "-c", &config, "--set", value]);

    assert_refused(
        &run(&["harvest", "-c", "nowhere.toml"]),
        2,
        &["nowhere.toml", "config.example.toml"],
    );
    assert_refused(
        &set("limits.concurency=3"),
        2,
        &["limits.concurency", "limits.concurrency"],
    );
    assert_refused(&set("teacher.api_key_env=NO_SUCH_KEY"), 2, &["NO_SUCH_KEY"]);
    assert_refused(&set("teacher.model="), 2, &["teacher.model"]);
    assert_refused(&set("prompts.source=missing.jsonl"), 2, &["missing.jsonl"]);
    // Nothing listens on port 9.
    assert_refused(&set("limits.concurrency=1"), 1, &["http://127.0.0.1:9/v1"]);
    // `.invalid` is reserved for host names that do not exist.
    assert_refused(
        &set("teacher.base_url=https://nowhere.invalid/v1"),
        1,
        &["nothing answers at https://nowhere.invalid/v1"],
    );

    std::fs::write(
        dir.path().join("template.toml"),
        "user = \"{{ sentence }}\"\n",
    )
    .unwrap();
    assert_refused(
        &run(&["harvest", "-c", &config]),
        2,
        &["prompts.jsonl:1", "sentence", "text"],
    );
    std::fs::write(
        dir.path().join("template.toml"),
        "user = \"{{ text }}\"\nusr = 1\n",
    )
    .unwrap();
    assert_refused(
        &run(&["harvest", "-c", &config]),
        2,
        &["template.toml", "usr"],
    );

    assert_refused(&run(&["train", "-c", &config]), 2, &["run/cache", "empty"]);
    assert_refused(&run(&["eval", "-c", &config]), 2, &["distill train"]);
    std::fs::remove_file(dir.path().join("model/tokenizer.json")).unwrap();
    assert_refused(&run(&["train", "-c", &config]), 2, &["tokenizer.json"]);
}

#[test]
fn unknown_model_name_stops_the_harvest() {
    let teacher_dir = tempfile::tempdir().unwrap();
    tiny::write_model(teacher_dir.path(), 5, 128);
    let teacher = Teacher::start(teacher_dir.path());
    let (_dir, config) = run_folder(&teacher.base_url);
    let output = run(&["harvest", "-c", &config, "--set", "teacher.model=huge"]);
    assert_refused(&output, 1, &["huge", "teacher.model"]);
}

#[test]
fn damaged_or_newer_cache_is_refused() {
    let (dir, config) = run_folder("http://127.0.0.1:9/v1");
    let cache = dir.path().join("run/cache");
    std::fs::create_dir_all(&cache).unwrap();
    let golden = include_str!("golden/cache-v1.jsonl");
    let file = cache.join("responses.jsonl");
    let first_line = golden.lines().next().unwrap().as_bytes();
    let mut newer = distill::cache::line::decode(first_line).unwrap();
    newer.v = 99;
    std::fs::write(&file, distill::cache::line::encode(&newer).unwrap()).unwrap();
    assert_refused(
        &run(&["harvest", "-c", &config]),
        5,
        &["responses.jsonl", "line 1", "99"],
    );
    std::fs::write(&file, golden.replacen("prompt_id", "prompt_ix", 1)).unwrap();
    assert_refused(
        &run(&["harvest", "-c", &config]),
        5,
        &["responses.jsonl", "line 1"],
    );
    assert_refused(&run(&["cache", "verify", "-c", &config]), 5, &["damaged"]);
}

#[test]
fn cache_lock_error_names_the_process() {
    let (dir, config) = run_folder("http://127.0.0.1:9/v1");
    let settings = distill::config::CacheConfig::default();
    let cache = distill::cache::Cache::open(&dir.path().join("run/cache"), &settings).unwrap();
    let pid = std::process::id().to_string();
    assert_refused(
        &run(&["harvest", "-c", &config]),
        1,
        &["another process", &pid],
    );
    drop(cache);
}

#[test]
fn config_show_prints_origins_and_ignores_a_closed_pipe() {
    let (_dir, config) = run_folder("http://127.0.0.1:9/v1");
    let shown = distill(&["config", "show", "-c", &config, "--set", "train.seed=5"])
        .env("DISTILL_TRAIN_EPOCHS", "2.5")
        .output()
        .unwrap();
    let shown = stdout(&shown);
    for line in [
        "train.seed = 5  # flag",
        "train.epochs = 2.5  # environment (DISTILL_TRAIN_EPOCHS)",
        "train.steps = 3  # file",
        "train.schedule = \"cosine\"  # default",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    assert!(stdout(&run(&["completions", "bash"])).contains("distill"));
    let status = distill(&["config", "show", "-c", &config])
        .stdout(closed_stdout())
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn closed_stdout_does_not_hide_a_failure() {
    let cache = tempfile::tempdir().unwrap();
    std::fs::write(cache.path().join("responses.jsonl"), "oops\n").unwrap();
    let verified = distill(&["cache", "verify", "--dir", cache.path().to_str().unwrap()])
        .stdout(closed_stdout())
        .output()
        .unwrap();
    assert_refused(&verified, 5, &["damaged lines: 1"]);
}

#[test]
fn variable_that_is_not_utf_8_is_ignored() {
    let (_dir, config) = run_folder("http://127.0.0.1:9/v1");
    let shown = distill(&["config", "show", "-c", &config])
        .env("LS_COLORS", OsStr::from_bytes(b"\xff"))
        .output();
    assert!(stdout(&shown.unwrap()).contains("train.steps"));
}

#[test]
fn temperature_that_is_not_finite_is_refused() {
    for temperature in ["nan", "inf", "-1"] {
        let temperature = format!("--temperature={temperature}");
        let refused = run(&["generate", "--model", "missing", &temperature, "hi"]);
        assert_refused(&refused, 2, &["--temperature must be finite"]);
    }
}

#[test]
fn mock_serves_its_script_and_reports_billing_on_ctrl_c() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script.toml");
    std::fs::write(
        &script,
        "model = \"tiny\"\n[[faults]]\nkind = \"http 500\"\nfirst = 1\nmatching = \"say 3\"",
    )
    .unwrap();
    let script = script.to_str().unwrap();
    let mut teacher = distill(&["serve", "--port", "0", "--mock", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(teacher.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let base_url = first.strip_prefix("listening on ").unwrap();
    let (_dir, config) = run_folder(base_url);
    let harvested = stdout(&run(&["harvest", "-c", &config, "--json"]));
    let summary: serde_json::Value = serde_json::from_str(&harvested).unwrap();
    assert_eq!(summary["ok"], 10, "{harvested}");
    let pid = teacher.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let printed: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(teacher.wait().unwrap().code(), Some(130));
    for (name, count) in [
        ("requests", "11"),
        ("  answered", "10"),
        ("  fault: http 500", "1"),
        ("billed answers", "10"),
        ("  billed 1 times", "10"),
    ] {
        let row = printed
            .iter()
            .find(|line| line.starts_with(&format!("{name}  ")));
        assert!(
            row.is_some_and(|row| row.ends_with(&format!(" {count}"))),
            "{name}: {printed:?}"
        );
    }

    std::fs::write(script, "[limits]\nrequest_per_minute = 3").unwrap();
    assert_refused(
        &run(&["serve", "--mock", script]),
        2,
        &["script.toml:2:1", "did you mean \"requests_per_minute\"?"],
    );
    assert_refused(
        &run(&["serve", "--mock", script, "--model", "x"]),
        2,
        &["--model"],
    );
    assert_refused(&run(&["serve"]), 2, &["--model"]);
}

#[cfg(target_os = "linux")]
#[test]
fn template_output_is_limited_to_512_mib() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("prompts.txt", "one\ntwo\n");
    let doubles = "{% set ns = namespace(s=text) %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    write("t.toml", &format!("user = \"{doubles}{{{{ ns.s }}}}\""));
    write(
        "run.toml",
        "[teacher]\nbase_url = \"http://localhost:9/v1\"\nmodel = \"m\"\napi_key_env = \"\"\n\
         [prompts]\nsource = \"prompts.txt\"\ntemplate = \"t.toml\"\n",
    );
    let config = dir.path().join("run.toml");
    let output = run(&["harvest", "--dry-run", "-c", config.to_str().unwrap()]);
    assert_refused(&output, 2, &["row 1", "t.toml", "512 MiB"]);
}
