//! A run that is interrupted anywhere and resumed ends with the same bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use distill::config::Config;
use distill::train::summary::StartMode;
use distill::train::{self, checkpoint};

use super::{metrics, run_folder};
use crate::nightly;

const STEPS: u64 = 20;

/// Trains without interruption, with all features that have state: several epochs, gradient accumulation, a moving
/// average, a co-trained teacher and on-policy answers.
fn uninterrupted_run() -> (tempfile::TempDir, Config) {
    let (dir, mut config) = run_folder();
    config.train.steps = Some(STEPS);
    config.train.micro_batch_size = 4;
    config.train.ema_decay = 0.9;
    config.train.eval_every = 3;
    config.train.checkpoint_every = 1;
    config.train.keep_checkpoints = 100;
    config.train.best = distill::config::BestMetric::Ce;
    config.loss.kd = distill::config::KdMode::Tail;
    config.teacher.local = Some(config.student.path.clone());
    config.teacher.cotrain = true;
    config.train.on_policy = true;
    config.on_policy.max_tokens = 6;
    train::run(&config, StartMode::New.into()).unwrap();
    (dir, config)
}

#[test]
fn second_training_in_the_same_run_folder_is_refused() {
    let (_dir, config) = run_folder();
    let path = config.run_dir.join("train.lock");
    std::fs::create_dir_all(&config.run_dir).unwrap();
    let lock = distill::fs::FileLock::acquire(&path, "").unwrap();
    let error = train::run(&config, StartMode::New.into()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("is training in this run folder"),
        "{message}"
    );
    assert!(!config.run_dir.join("metrics.jsonl").exists());
    drop(lock);
    train::run(&config, StartMode::New.into()).unwrap();
}

/// Returns the files of a finished run by name, and its metrics.
fn outcome(config: &Config) -> (BTreeMap<String, Vec<u8>>, Vec<serde_json::Value>) {
    let last = config.run_dir.join(format!("checkpoints/step-{STEPS:06}"));
    let mut files = BTreeMap::new();
    for folder in [last, config.student_dir(), config.run_dir.join("teacher")] {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path
                .strip_prefix(&config.run_dir)
                .unwrap()
                .display()
                .to_string();
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
    (files, metrics(config))
}

fn assert_same_outcome(config: &Config, uninterrupted: &Config, context: &str) {
    let (files, lines) = outcome(config);
    let (expected_files, expected_lines) = outcome(uninterrupted);
    assert!(files.keys().eq(expected_files.keys()), "{context}");
    for (name, bytes) in &files {
        assert!(*bytes == expected_files[name], "{name}: {context}");
    }
    assert_eq!(lines, expected_lines, "{context}");
}

/// Copies the run folder of an uninterrupted run with the checkpoints up to step `last`, and with all its metrics, as
/// if the run was killed before it wrote the next checkpoint.
fn killed_after(uninterrupted: &Config, last: u64) -> Config {
    let mut config = uninterrupted.clone();
    config.run_dir = uninterrupted
        .run_dir
        .with_file_name(format!("killed-{last}"));
    let _ = std::fs::remove_dir_all(&config.run_dir);
    let from = uninterrupted.run_dir.join("checkpoints");
    for step in 1..=last {
        copy_folder(
            &from.join(format!("step-{step:06}")),
            &config.run_dir.join(format!("checkpoints/step-{step:06}")),
        );
    }
    let lines = std::fs::read_to_string(uninterrupted.run_dir.join("metrics.jsonl")).unwrap();
    std::fs::write(config.run_dir.join("metrics.jsonl"), lines).unwrap();
    config
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn resume_after_any_step_ends_with_the_same_bytes() {
    let (_dir, uninterrupted) = uninterrupted_run();
    for last in 1..STEPS {
        let mut config = killed_after(&uninterrupted, last);
        // Neither setting changes the weights.
        config.train.threads = 1 + last as usize % 3;
        config.train.activation_checkpointing = last % 2 == 0;
        train::run(&config, StartMode::Resume.into()).unwrap();
        assert_same_outcome(&config, &uninterrupted, &format!("after a stop at {last}"));
    }
}

#[test]
fn resume_ignores_paths_and_reports_changed_settings() {
    let (dir, uninterrupted) = uninterrupted_run();
    let mut config = killed_after(&uninterrupted, 7);
    // The same files under another path.
    let other_path = dir.path().join("other");
    std::os::unix::fs::symlink(&config.student.path, &other_path).unwrap();
    config.student.path = other_path.clone();
    config.teacher.local = Some(other_path);
    train::run(&config, StartMode::Resume.into()).unwrap();
    let weights = |config: &Config| std::fs::read(config.student_dir().join("model.safetensors"));
    assert!(weights(&config).unwrap() == weights(&uninterrupted).unwrap());

    let mut config = killed_after(&uninterrupted, 7);
    config.train.learning_rate *= 2.0;
    config.loss.kd_weight = Some(0.25);
    let error = train::run(&config, StartMode::Resume.into()).err().unwrap();
    assert_eq!(distill::exit::Exit::code_of(&error), 2);
    let error = error.to_string();
    assert!(error.contains("train.learning_rate was"), "{error}");
    assert!(
        error.contains("loss.kd_weight was") && error.contains("is 0.25"),
        "{error}"
    );
    assert!(!error.contains("train.beta1"), "{error}");
}

#[test]
fn partly_removed_checkpoint_is_removed() {
    let (_dir, uninterrupted) = uninterrupted_run();
    let config = killed_after(&uninterrupted, 7);
    let checkpoints = config.run_dir.join("checkpoints");
    let partly_removed = checkpoints.join("step-000000");
    std::fs::create_dir(&partly_removed).unwrap();
    std::fs::write(partly_removed.join("model.safetensors"), "").unwrap();
    // It does not count as one of the checkpoints to keep.
    assert!(checkpoints.join("step-000007").exists());
    train::run(&config, StartMode::Resume.into()).unwrap();
    assert!(!partly_removed.exists());
    assert_same_outcome(&config, &uninterrupted, "partly removed checkpoint");
}

#[test]
fn resume_ignores_a_partly_written_checkpoint() {
    let (_dir, uninterrupted) = uninterrupted_run();
    let next = uninterrupted.run_dir.join("checkpoints/step-000008");
    let files = [
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "teacher.safetensors",
        "teacher_optimizer.safetensors",
        "state.json",
    ];
    // The run is killed during the write of each file, between two files, or before the rename of the folder.
    for written in 0..=files.len() {
        for part in [0, 1, 2] {
            let config = killed_after(&uninterrupted, 7);
            let incomplete = config.run_dir.join("checkpoints/.step-000008.new");
            std::fs::create_dir(&incomplete).unwrap();
            for file in &files[..written] {
                std::fs::copy(next.join(file), incomplete.join(file)).unwrap();
            }
            if let Some(file) = files.get(written) {
                let bytes = std::fs::read(next.join(file)).unwrap();
                let length = bytes.len() * part / 2;
                std::fs::write(incomplete.join(file), &bytes[..length]).unwrap();
            }
            train::run(&config, StartMode::Resume.into()).unwrap();
            let context = format!("killed after {written} files and {part}/2 of the next one");
            assert_same_outcome(&config, &uninterrupted, &context);
            assert!(!incomplete.exists());
        }
    }
}

/// Writes the config file of a run for the real binary.
fn config_file(config: &Config) -> PathBuf {
    let path = config.run_dir.with_file_name("config.toml");
    let train = &config.train;
    let text = format!(
        "run_dir = {:?}\n[teacher]\nlocal = {:?}\ncotrain = true\n[student]\ninit = \"random\"\npath = {:?}\nhidden_size = {}\n\
         intermediate_size = {}\nnum_hidden_layers = {}\nnum_attention_heads = {}\n\
         num_key_value_heads = {}\n[data]\nsource = {:?}\nvalidation_share = {}\n[loss]\n\
         kd = \"tail\"\n[train]\nsteps = {STEPS}\nbatch_size = {}\nmicro_batch_size = {}\n\
         warmup_steps = {}\nlearning_rate = {}\nema_decay = {}\neval_every = {}\n\
         checkpoint_every = 1\nkeep_checkpoints = 100\nbest = \"ce\"\non_policy = true\n\
         [on_policy]\nmax_tokens = 6\n",
        config.run_dir,
        config.student.path,
        config.student.path,
        config.student.hidden_size,
        config.student.intermediate_size,
        config.student.num_hidden_layers,
        config.student.num_attention_heads,
        config.student.num_key_value_heads,
        config.data.source.as_ref().unwrap(),
        config.data.validation_share,
        train.batch_size,
        train.micro_batch_size,
        train.warmup_steps,
        train.learning_rate,
        train.ema_decay,
        train.eval_every,
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// Returns the command `distill train` for a config file. `setup` is a shell command that runs before it.
fn train_command(config: &Path, start_flag: &str, setup: &str) -> Command {
    let mut command = Command::new("bash");
    command
        .args([
            "-c",
            &format!("{setup} exec \"$0\" train --json {start_flag} -c \"$1\""),
        ])
        .arg(env!("CARGO_BIN_EXE_distill"))
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn assert_success(output: Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
}

#[test]
fn training_killed_at_random_moments_resumes_to_the_same_bytes() {
    let (_dir, uninterrupted) = uninterrupted_run();
    let mut config = uninterrupted.clone();
    config.run_dir = uninterrupted.run_dir.with_file_name("killed");
    let file = config_file(&config);
    let checkpoints = config.run_dir.join("checkpoints");
    let mut random = fastrand::Rng::with_seed(8);
    let max_kills = if nightly() { 500 } else { 10 };
    let mut kills = 0;
    for round in 0.. {
        // Without a checkpoint, the run starts from the beginning.
        let has_checkpoint = std::fs::read_dir(&checkpoints).is_ok_and(|entries| {
            let names = entries.map(|entry| entry.unwrap().file_name());
            names
                .into_iter()
                .any(|name| !name.to_string_lossy().starts_with('.'))
        });
        let start_flag = if has_checkpoint {
            "--resume"
        } else {
            "--fresh"
        };
        let mut command = train_command(&file, start_flag, "");
        if kills == max_kills {
            assert_success(command.output().unwrap());
            assert_same_outcome(&config, &uninterrupted, "after kills");
            return;
        }
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.u64(5..120)));
        child.kill().unwrap();
        // After a run that finished before the kill, the next one starts from the beginning.
        if child.wait().unwrap().success() {
            assert_same_outcome(&config, &uninterrupted, &format!("round {round}"));
            std::fs::remove_dir_all(&config.run_dir).unwrap();
        } else {
            kills += 1;
        }
    }
}

#[test]
fn full_disk_keeps_the_previous_checkpoint() {
    let (_dir, uninterrupted) = uninterrupted_run();
    let config = killed_after(&uninterrupted, 7);
    let file = config_file(&config);
    let size = |name: &str| {
        let path = uninterrupted
            .run_dir
            .join("checkpoints/step-000008")
            .join(name);
        std::fs::metadata(path).unwrap().len()
    };
    // A limit of the file size between the weights and the moments, which are twice as large.
    let max_kib = size("optimizer.safetensors") / 1024 - 1;
    assert!(max_kib * 1024 > size("model.safetensors"));
    let limit_file_size = format!("trap '' XFSZ; ulimit -f {max_kib};");
    let mut command = train_command(&file, "--resume", &limit_file_size);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("optimizer.safetensors"), "{stderr}");
    let names: Vec<_> = std::fs::read_dir(config.run_dir.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.contains(&"step-000007".to_string()), "{names:?}");
    assert!(
        !names.iter().any(|name| name.contains("000008")),
        "{names:?}"
    );
    assert_success(train_command(&file, "--resume", "").output().unwrap());
    assert_same_outcome(&config, &uninterrupted, "after a full disk");
}

#[test]
fn checkpoint_that_changed_on_disk_is_refused() {
    let (_dir, config) = uninterrupted_run();
    let checkpoints = config.run_dir.join("checkpoints");
    let last = checkpoints.join(format!("step-{STEPS:06}"));
    // Flips a bit of each of these files.
    for name in [
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "teacher.safetensors",
    ] {
        let path = last.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = train::run(&config, StartMode::Resume.into()).unwrap_err();
        let message = format!("{error:#}");
        assert!(
            message.contains(name) && message.contains("checksum"),
            "{message}"
        );
        assert_eq!(distill::exit::Exit::code_of(&error), 5, "{message}");
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
    }
    let path = last.join("state.json");
    let state = std::fs::read_to_string(&path).unwrap();
    let step = format!("\"step\": {STEPS}");
    assert!(state.contains(&step));
    std::fs::write(&path, state.replace(&step, "\"step\": 7")).unwrap();
    let error = train::run(&config, StartMode::Resume.into()).unwrap_err();
    assert_eq!(distill::exit::Exit::code_of(&error), 5, "{error:#}");
    // A checkpoint of another version is not damaged. It may have other fields.
    for (other, expected) in [
        ("{\"version\": 1}", "an earlier version"),
        ("{\"version\": 3}", "a later version"),
    ] {
        std::fs::write(&path, other).unwrap();
        let error = train::run(&config, StartMode::Resume.into()).unwrap_err();
        let message = format!("{error:#}");
        assert!(
            message.contains(expected) && message.contains("--fresh"),
            "{message}"
        );
        assert_eq!(distill::exit::Exit::code_of(&error), 2, "{message}");
    }
    std::fs::write(&path, state).unwrap();
    train::run(&config, StartMode::Resume.into()).unwrap();

    // `load_weights`, which loads the best checkpoint, also verifies it.
    checkpoint::load_weights(&checkpoints, 7).unwrap();
    let replaced = checkpoints.join("step-000007/ema.safetensors");
    std::fs::copy(last.join("ema.safetensors"), replaced).unwrap();
    let error = checkpoint::load_weights(&checkpoints, 7).unwrap_err();
    assert_eq!(distill::exit::Exit::code_of(&error), 5, "{error:#}");
    // A resumed run would need the best checkpoint again, so moving it away does not help.
    let message = error.to_string();
    assert!(
        message.contains("from a backup") && !message.contains("move it away"),
        "{message}"
    );
}
