//! The real binary dies, is stopped, and meets itself, at moments that nobody chose: rows K1, K7 and
//! K8 of the promises.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use distill::cache::{self, reader};
use distill::serve::mock::Mock;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::mock::server::Server;
use crate::nightly;

/// A scripted teacher on loopback, and a run folder whose harvest asks it.
struct Stage {
    folder: tempfile::TempDir,
    mock: Arc<Mock>,
    prompts: usize,
    concurrency: u64,
    /// Serves until the stage is dropped.
    _runtime: Runtime,
}

impl Stage {
    fn new(prompts: usize, script: &str, settings: &str) -> Stage {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::start(script));
        let folder = tempfile::tempdir().unwrap();
        let concurrency = 12;
        let config = format!(
            r#"
            run_dir = "run"
            [teacher]
            base_url = "http://{}/v1"
            model = "mock"
            api_key_env = ""
            [prompts]
            source = "prompts.txt"
            [sampling]
            max_tokens = 4096
            top_logprobs = 0
            [limits]
            concurrency = {concurrency}
            adapt = false
            {settings}
            "#,
            server.address
        );
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        let lines: String = (0..prompts).map(|n| format!("prompt {n}\n")).collect();
        std::fs::write(folder.path().join("prompts.txt"), lines).unwrap();
        Stage {
            folder,
            mock: server.mock,
            prompts,
            concurrency,
            _runtime: runtime,
        }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("run/cache")
    }

    fn start(&self) -> Child {
        Command::new(env!("CARGO_BIN_EXE_distill"))
            .args(["harvest", "--json", "-c"])
            .arg(self.folder.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs to the end, which must be a good one. What a kill may have cost is told.
    fn finish(&self) {
        let ledger = std::fs::read(self.folder.path().join("run/ledger.json"));
        let ledger: Value = serde_json::from_slice(&ledger.unwrap_or_default()).unwrap_or_default();
        let in_flight = ledger["in_flight"]["requests"].as_u64().unwrap_or(0);
        let (status, errors) = end(self.start(), Duration::from_secs(60));
        assert!(status.success(), "{errors}");
        let told = format!("the last run was killed: at most {in_flight} requests");
        assert_eq!(errors.contains(&told), in_flight > 0, "{errors}");
    }

    fn billed(&self) -> u64 {
        self.mock.stats().billed.answers
    }

    /// The keys of the records. Each whole line of the cache is a record, and no key has two.
    fn keys(&self) -> HashSet<String> {
        if !cache::exists(&self.cache()) {
            return HashSet::new();
        }
        let findings = reader::examine(&self.cache(), &mut |_, _| {}).unwrap();
        assert!(findings.damaged.is_empty(), "{:?}", findings.damaged);
        assert!(findings.repeated.is_empty(), "{:?}", findings.repeated);
        let records = cache::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().key).collect()
    }

    fn prompt_ids(&self) -> HashSet<String> {
        let records = cache::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().prompt_id).collect()
    }
}

/// Waits for the process, but not for ever, and returns what it wrote to stderr.
fn end(mut child: Child, longest: Duration) -> (ExitStatus, String) {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > longest {
            child.kill().unwrap();
            panic!("the harvest hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (
        output.status,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Enough text that frames are made while it is killed.
const LONG: &str = "[2000, 4000]";

/// Kills harvests of one run folder until all is done. Returns the number of kills.
fn kill_until_done(
    random: &mut fastrand::Rng,
    tokens: &str,
    prompts: usize,
    settings: &str,
) -> u64 {
    let script = format!("[answers]\ntokens = {tokens}\nlatency_s = [0.0, 0.05]\n");
    let stage = Stage::new(prompts, &script, settings);
    let (mut kills, mut before) = (0, HashSet::new());
    loop {
        let mut child = stage.start();
        std::thread::sleep(Duration::from_millis(random.u64(5..220)));
        let is_done = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        let (status, errors) = end(child, Duration::from_secs(10));
        assert!(!is_done || status.success(), "{errors}");
        kills += u64::from(!is_done);
        let keys = stage.keys();
        assert!(before.is_subset(&keys), "a record is gone");
        before = keys;
        if is_done || kills == 60 {
            break;
        }
    }
    stage.finish();
    assert_eq!(stage.prompt_ids().len(), prompts);
    assert_eq!(stage.keys().len(), prompts);
    if tokens == LONG {
        let frames = std::fs::metadata(cache::compressed_file(&stage.cache())).unwrap();
        assert!(frames.len() > 0, "nothing was compressed");
    }
    let twice = stage.billed() - stage.prompts as u64;
    assert!(
        twice <= kills * stage.concurrency,
        "{twice} answers bought twice over {kills} kills"
    );
    println!(
        "{settings:?}, {tokens} tokens: {prompts} rows, {kills} kills, 0 lost, {twice} bought twice"
    );
    kills
}

#[test]
fn killed_at_any_moment_it_goes_on_with_nothing_lost() {
    let wanted = if nightly() { 1000 } else { 50 };
    let mut random = fastrand::Rng::with_seed(4);
    let mut kills = 0;
    for (round, (tokens, prompts, settings)) in [
        ("[5, 40]", 500, ""),
        ("[5, 40]", 500, "[cache]\ndurability = \"none\""),
        (LONG, 1500, "[cache]\ncompression = \"zstd\""),
        (
            "[5, 40]",
            400,
            "[cache]\ndurability = \"record\"\ncompression = \"zstd\"",
        ),
    ]
    .into_iter()
    .cycle()
    .enumerate()
    {
        if kills >= wanted && round >= 4 {
            break;
        }
        kills += kill_until_done(&mut random, tokens, prompts, settings);
    }
    println!("{kills} kills");
}

#[test]
fn two_processes_never_write_one_cache() {
    for round in 0..if nightly() { 100 } else { 10 } {
        let script = "[answers]\ntokens = [5, 40]\nlatency_s = [0.0, 0.02]\n";
        let stage = Stage::new(60, script, "");
        let pair = [stage.start(), stage.start()];
        let ends = pair.map(|child| end(child, Duration::from_secs(30)));
        let mut refused = 0;
        for (status, errors) in &ends {
            if !status.success() {
                refused += 1;
                assert_eq!(status.code(), Some(1), "round {round}: {errors}");
                // With its pid, once the first one has written that.
                assert!(errors.contains("another process"), "{errors}");
            }
        }
        // Both can be in order: one after the other.
        assert!(refused <= 1, "round {round}: {ends:?}");
        assert_eq!(stage.keys().len(), 60);
        assert_eq!(stage.billed(), 60, "round {round}");
    }
}

#[test]
fn signals_drain_what_is_in_flight() {
    let mut random = fastrand::Rng::with_seed(8);
    let mut drained = 0;
    for round in 0..if nightly() { 200 } else { 20 } {
        let settings = match round % 2 {
            0 => "",
            _ => "[cache]\ncompression = \"zstd\"",
        };
        let script = "[answers]\ntokens = [5, 40]\nlatency_s = [0.0, 0.08]\n";
        let stage = Stage::new(300, script, settings);
        let child = stage.start();
        std::thread::sleep(Duration::from_millis(random.u64(60..900)));
        let (name, code) = [("INT", 130), ("TERM", 143)][round / 2 % 2];
        signal(&child, name);
        let (status, errors) = end(child, Duration::from_secs(10));
        match status.code() {
            Some(found) if found == code => drained += 1,
            Some(0) => assert_eq!(stage.keys().len(), 300),
            other => panic!("round {round}, {name}: {other:?}, {errors}"),
        }
        // What was asked was answered, recorded, and bought once.
        assert_eq!(stage.billed(), stage.keys().len() as u64, "round {round}");
        stage.finish();
        assert_eq!((stage.billed(), stage.keys().len()), (300, 300));
    }
    assert!(drained >= 10, "{drained}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let script = "[answers]\ntokens = [5, 40]\nlatency_s = 30.0\n";
    let stage = Stage::new(40, script, "");
    let child = stage.start();
    while stage.mock.stats().requests < stage.concurrency {
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, "INT");
    std::thread::sleep(Duration::from_millis(100));
    let second = Instant::now();
    signal(&child, "INT");
    let (status, errors) = end(child, Duration::from_secs(10));
    assert_eq!(status.code(), Some(130), "{errors}");
    assert!(
        second.elapsed() < Duration::from_secs(2),
        "{:?}",
        second.elapsed()
    );
    assert!(!Path::new(&stage.cache()).join("responses.torn").exists());
}
