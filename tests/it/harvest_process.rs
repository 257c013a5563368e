//! Harvests by the real binary against a scripted teacher on loopback.

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

/// A scripted teacher on loopback, and a run folder with a config for it.
pub struct HarvestFixture {
    pub folder: tempfile::TempDir,
    pub mock: Arc<Mock>,
    pub prompts: usize,
    pub concurrency: u64,
    /// Runs the teacher until the fixture is dropped.
    _runtime: Runtime,
}

impl HarvestFixture {
    /// `script` is the script of the teacher. `settings` is appended to the config: lines of the section `[limits]`, or
    /// further sections.
    pub fn new(prompts: usize, script: &str, settings: &str) -> HarvestFixture {
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
        HarvestFixture {
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

    /// Starts `distill harvest`.
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

    /// Runs a harvest that must succeed. If the previous harvest was killed, this one must report the requests that may
    /// have been billed.
    pub fn finish(&self) {
        let ledger = std::fs::read(self.folder.path().join("run/ledger.json"));
        let ledger: Value = serde_json::from_slice(&ledger.unwrap_or_default()).unwrap_or_default();
        let in_flight = ledger["in_flight"]["requests"].as_u64().unwrap_or(0);
        let (status, errors) = wait_for_end(self.start(), Duration::from_secs(60));
        assert!(status.success(), "{errors}");
        let warning = format!("the last run was killed: up to {in_flight} requests");
        assert_eq!(errors.contains(&warning), in_flight > 0, "{errors}");
    }

    /// Returns the number of billed answers.
    pub fn billed(&self) -> u64 {
        self.mock.stats().billed.answers
    }

    /// Returns the keys of all records. Checks that no record is damaged and that no key occurs twice.
    pub fn keys(&self) -> HashSet<String> {
        if !cache::exists(&self.cache()) {
            return HashSet::new();
        }
        let findings = reader::verify_cache(&self.cache(), &mut |_, _| Ok(())).unwrap();
        assert!(findings.damaged.is_empty(), "{:?}", findings.damaged);
        assert!(findings.repeated.is_empty(), "{:?}", findings.repeated);
        let records = reader::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().key).collect()
    }

    pub fn prompt_ids(&self) -> HashSet<String> {
        let records = reader::read(&self.cache()).unwrap();
        records.map(|record| record.unwrap().prompt_id).collect()
    }
}

/// Waits for a process. Returns its exit status and its stderr. Panics after `timeout`.
pub fn wait_for_end(mut child: Child, timeout: Duration) -> (ExitStatus, String) {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > timeout {
            child.kill().unwrap();
            panic!("the process still runs after {timeout:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (
        output.status,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Returns true if this process ignores SIGHUP, as under `nohup`. Its child processes then ignore it as well.
pub fn ignores_hang_ups() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The lowest bit is signal 1, SIGHUP.
    ignored.is_some_and(|mask| mask & 1 != 0)
}

/// Sends a signal. `name` is without the prefix `SIG`.
pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}
