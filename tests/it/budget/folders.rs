//! Tests the invariant on run folders with the real binary. It harvests, probes, sends batches and is killed. Caches
//! are truncated, repaired, deleted and merged, and prices are set late. A scripted teacher counts the tokens that it
//! bills.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use distill::cache;
use distill::mock::Mock;
use tokio::runtime::Runtime;

use crate::mock::server::Server;
use crate::nightly;

/// Script of the teacher. Every answer costs about as much as is reserved for it. Some attempts are billed without an
/// answer, some answers have no usage, and batches lose rows.
const TEACHER: &str = r#"
[answers]
tokens = 64
latency_s = [0.0, 0.04]
[[faults]]
kind = "http 500"
billed = true
share = 0.05
[[faults]]
kind = "reset in body"
share = 0.05
[[faults]]
kind = "no usage"
share = 0.1
[batch]
clock = 40000.0
lost_rows = 2
"#;

/// A run folder with its teacher, and the state of the test.
struct Folder {
    dir: tempfile::TempDir,
    mock: Arc<Mock>,
    random: fastrand::Rng,
    /// Config of every command, without the run folder, the price and the budget.
    config: String,
    /// Whether the config has a price and a budget. They are set at a random step.
    is_priced: bool,
    /// Budget in dollars. It is raised at random steps.
    cap: f64,
    /// Cost in dollars of the answers of other teachers that were merged.
    merged: f64,
    merges: u32,
    /// Whether requests were sent under the cap and nothing was merged since then. If so, the billed dollars must be
    /// within the cap.
    is_cap_checked: bool,
    /// Number of steps that sent requests under the cap.
    steps_under_cap: u32,
    /// Descriptions of the steps so far.
    history: Vec<String>,
    runtime: Runtime,
}

impl Folder {
    fn new(seed: u64) -> Folder {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::start(TEACHER));
        let dir = tempfile::tempdir().unwrap();
        let prompts: String = (0..400).map(|n| format!("number {n}\n")).collect();
        std::fs::write(dir.path().join("prompts.txt"), prompts).unwrap();
        let config = r#"
            [teacher]
            base_url = "http://ADDRESS/v1"
            model = "mock"
            api_key_env = ""
            [prompts]
            source = "prompts.txt"
            [sampling]
            max_tokens = 64
            top_logprobs = 0
            [limits]
            concurrency = 6
            adapt = false
            [retry]
            base_s = 0.01
            max_s = 0.05
            [batch]
            discount = 1.0
            poll_s = 0.05
            max_requests = 15
            "#;
        let config = config.replace("ADDRESS", &server.address.to_string());
        let config = config.replace(
            "prompts.txt",
            &dir.path().join("prompts.txt").display().to_string(),
        );
        Folder {
            dir,
            mock: server.mock,
            random: fastrand::Rng::with_seed(seed),
            config,
            is_priced: false,
            cap: 0.003,
            merged: 0.0,
            merges: 0,
            is_cap_checked: false,
            steps_under_cap: 0,
            history: Vec::new(),
            runtime,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Takes a random step: runs a command, or changes the cache.
    fn step(&mut self) {
        if !self.is_priced && self.random.u32(0..4) > 0 {
            self.history.push("prices".into());
            self.is_priced = true;
        }
        if self.random.bool() {
            self.cap += 0.001;
        }
        let sent_before = self.sent();
        match self.random.u32(0..16) {
            0..6 => self.run_command(&["harvest"]),
            6..8 => self.run_command(&["probe"]),
            8..11 => self.run_command(&["harvest", "--set", "schedule.mode=\"batch\""]),
            // The deadline has passed, so the batches are cancelled and the other rows are sent in real time.
            11 => self.run_command(&[
                "harvest",
                "--set",
                "schedule.mode=\"batch\"",
                "--set",
                "schedule.deadline=\"2026-01-01 06:00\"",
            ]),
            12 => self.truncate_and_repair(),
            13 => self.delete_cache(),
            _ => self.merge(),
        }
        // Requests in flight at a kill are billed a little later.
        std::thread::sleep(Duration::from_millis(60));
        if self.is_priced && self.sent() > sent_before {
            self.is_cap_checked = true;
            self.steps_under_cap += 1;
        }
        self.check();
    }

    /// Returns the number of answers billed in real time, plus the number of batches in the journal.
    fn sent(&self) -> usize {
        let journal = std::fs::read_to_string(self.path("run/batches.json")).unwrap_or_default();
        let billed = self.mock.stats().billed;
        let real_time_answers = billed.answers - billed.batch_answers;
        real_time_answers as usize + journal.matches("\"nonce\"").count()
    }

    /// Returns the dollars billed by this teacher, plus the cost of merged answers.
    fn billed(&self) -> f64 {
        let billed = self.mock.stats().billed;
        let prompts = 0.01 * billed.prompt_tokens as f64;
        (prompts + 2.0 * billed.completion_tokens as f64) / 1e6 + self.merged
    }

    /// Checks that the billed dollars are within the cap, if they must be.
    fn check(&self) {
        let billed = self.billed();
        assert!(
            !self.is_cap_checked || billed <= self.cap,
            "${billed} is billed, and the cap is ${}: {:#?}",
            self.cap,
            self.history
        );
    }

    /// Runs a command. In half of the cases, kills it after a random time.
    fn run_command(&mut self, command: &[&str]) {
        let mut child = self.start(&self.path("run"), &self.config, command);
        let kill_after_ms = self.random.u64(50..900);
        let is_killed = self.random.bool();
        if is_killed {
            std::thread::sleep(Duration::from_millis(kill_after_ms));
            // The kill fails if the process has already ended.
            let _ = child.kill();
        }
        let errors = wait_for_end(child, Duration::from_millis(4_000));
        self.history
            .push(format!("{command:?}, killed: {is_killed}: {errors}"));
    }

    fn start(&self, run_dir: &Path, config: &str, command: &[&str]) -> Child {
        let mut config = format!("run_dir = {run_dir:?}\n{config}");
        if self.is_priced {
            config.push_str("\n[price]\ninput = 0.01\noutput = 2.0\nas_of = \"2026-11-01\"\n");
            config.push_str(&format!("[budget]\nusd = {}\n", self.cap));
        }
        let file = run_dir.with_extension("toml");
        std::fs::write(&file, config).unwrap();
        Command::new(env!("CARGO_BIN_EXE_distill"))
            .args(command)
            .arg("--json")
            .arg("-c")
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Truncates the cache file at a random byte and repairs it.
    fn truncate_and_repair(&mut self) {
        let file = cache::plain_file(&self.path("run/cache"));
        let Ok(metadata) = std::fs::metadata(&file) else {
            return;
        };
        let length = self.random.u64(0..=metadata.len());
        OpenOptions::new()
            .write(true)
            .open(file)
            .unwrap()
            .set_len(length)
            .unwrap();
        self.run_cache_command(&["repair", "--dir"]);
        self.history
            .push(format!("truncated to {length} bytes and repaired"));
    }

    fn delete_cache(&mut self) {
        if self.path("run/cache").exists() {
            std::fs::remove_dir_all(self.path("run/cache")).unwrap();
            self.history.push("deleted the cache".into());
        }
    }

    /// Harvests from another teacher into another folder and merges that cache. The cost of its answers counts from
    /// then on.
    fn merge(&mut self) {
        if !self.is_priced {
            return;
        }
        self.merges += 1;
        let other = self.path(&format!("other-{}", self.merges));
        let server = self
            .runtime
            .block_on(Server::start("[answers]\ntokens = [5, 60]"));
        let base_url = self
            .config
            .lines()
            .find(|line| line.contains("base_url"))
            .unwrap();
        let other_base_url = format!("base_url = \"http://{}/v1\"", server.address);
        let config = self.config.replace(base_url, &other_base_url);
        let errors = wait_for_end(
            self.start(&other, &config, &["harvest", "--limit", "5"]),
            Duration::from_secs(10),
        );
        let records = distill::cache::reader::read(&other.join("cache")).expect(&errors);
        let costs = records.map(|record| record.unwrap().cost_usd.unwrap());
        self.merged += costs.sum::<f64>();
        self.is_cap_checked = false;
        self.run_cache_command(&["merge", other.join("cache").to_str().unwrap(), "--dir"]);
        self.history.push(format!("merged, now {}", self.merged));
    }

    /// Runs a subcommand of `distill cache` on the cache of the run folder.
    fn run_cache_command(&self, command: &[&str]) {
        let output = Command::new(env!("CARGO_BIN_EXE_distill"))
            .arg("cache")
            .args(command)
            .arg(self.path("run/cache"))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {errors}");
    }
}

/// Waits until the process ends, and kills it if that takes longer than `timeout`. Returns its output on stderr.
fn wait_for_end(mut child: Child, timeout: Duration) -> String {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > timeout {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn run_folder_billing_never_exceeds_the_cap() {
    let (folders, steps) = if nightly() { (60, 30) } else { (4, 16) };
    for seed in 0..folders {
        let mut folder = Folder::new(seed);
        for _ in 0..steps {
            folder.step();
        }
        println!(
            "seed {seed}: ${:.4} billed, cap ${:.4}, {} steps under the cap",
            folder.billed(),
            folder.cap,
            folder.steps_under_cap
        );
    }
}
