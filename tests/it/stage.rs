//! The real binary, a scripted teacher on loopback, and a run folder.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use distill::cache::{self, reader};
use distill::mock::Mock;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::mock::server::Server;

/// A scripted teacher on loopback, and a run folder whose harvest asks it.
pub struct Stage {
    pub folder: tempfile::TempDir,
    pub mock: Arc<Mock>,
    pub prompts: usize,
    pub concurrency: u64,
    /// Serves until the stage is dropped.
    _runtime: Runtime,
}

impl Stage {
    pub fn new(prompts: usize, script: &str, settings: &str) -> Stage {
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

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("run/cache")
    }

    pub fn start(&self) -> Child {
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
    pub fn finish(&self) {
        let ledger = std::fs::read(self.folder.path().join("run/ledger.json"));
        let ledger: Value = serde_json::from_slice(&ledger.unwrap_or_default()).unwrap_or_default();
        let in_flight = ledger["in_flight"]["requests"].as_u64().unwrap_or(0);
        let (status, errors) = end(self.start(), Duration::from_secs(60));
        assert!(status.success(), "{errors}");
        let told = format!("the last run was killed: up to {in_flight} requests");
        assert_eq!(errors.contains(&told), in_flight > 0, "{errors}");
    }

    pub fn billed(&self) -> u64 {
        self.mock.stats().billed.answers
    }

    /// The keys of the records. Each whole line of the cache is a record, and no key has two.
    pub fn keys(&self) -> HashSet<String> {
        if !cache::exists(&self.cache()) {
            return HashSet::new();
        }
        let findings = reader::verify_cache(&self.cache(), &mut |_, _| Ok(())).unwrap();
        assert!(findings.damaged.is_empty(), "{:?}", findings.damaged);
        assert!(findings.repeated.is_empty(), "{:?}", findings.repeated);
        let records = distill::cache::reader::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().key).collect()
    }

    pub fn prompt_ids(&self) -> HashSet<String> {
        let records = distill::cache::reader::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().prompt_id).collect()
    }
}

/// Waits for the process, but not for ever, and returns what it wrote to stderr.
pub fn end(mut child: Child, longest: Duration) -> (ExitStatus, String) {
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

/// Were the tests started with hang-ups ignored, as by `nohup`? So are their children.
pub fn ignores_hang_ups() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 != 0)
}

pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}
