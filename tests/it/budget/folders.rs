//! The invariant over real run folders: the real binary harvests, probes, sends batches and is killed; caches are
//! repaired, cut, deleted and merged; prices come late. A scripted teacher says what it has billed.

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

/// Every answer costs about as much as is reserved for it; attempts are billed that bring nothing, answers come without usage, batches lose rows.
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

struct Folder {
    dir: tempfile::TempDir,
    mock: Arc<Mock>,
    random: fastrand::Rng,
    /// Settings that every command has.
    config: String,
    /// Set once, at a random time: from then on there is a cap, which is raised at times.
    is_priced: bool,
    cap: f64,
    /// Dollars merged in from another cache, billed by another teacher.
    merged: f64,
    merges: u32,
    /// Something was sent under the cap, and nothing merged since: all that is billed is within it.
    is_bound: bool,
    /// Steps that sent something under the cap.
    steps_within: u32,
    done: Vec<String>,
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
            is_bound: false,
            steps_within: 0,
            done: Vec::new(),
            runtime,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// One of the things that a run folder goes through.
    fn step(&mut self) {
        if !self.is_priced && self.random.u32(0..4) > 0 {
            self.done.push("prices".into());
            self.is_priced = true;
        }
        if self.random.bool() {
            self.cap += 0.001;
        }
        let sent = self.sent();
        match self.random.u32(0..16) {
            0..6 => self.ask(&["harvest"]),
            6..8 => self.ask(&["probe"]),
            8..11 => self.ask(&["harvest", "--set", "schedule.mode=\"batch\""]),
            // Its batches are cancelled, and the rest is asked in real time.
            11 => self.ask(&[
                "harvest",
                "--set",
                "schedule.mode=\"batch\"",
                "--set",
                "schedule.deadline=\"2026-01-01 06:00\"",
            ]),
            12 => self.cut_and_repair(),
            13 => self.delete_cache(),
            _ => self.merge(),
        }
        // What was in flight at a kill is billed a little later.
        std::thread::sleep(Duration::from_millis(60));
        if self.is_priced && self.sent() > sent {
            self.is_bound = true;
            self.steps_within += 1;
        }
        self.check();
    }

    /// Answers that were billed, and batches that were sent.
    fn sent(&self) -> usize {
        let journal = std::fs::read_to_string(self.path("run/batches.json")).unwrap_or_default();
        let billed = self.mock.stats().billed;
        let in_real_time = billed.answers - billed.batch_answers;
        in_real_time as usize + journal.matches("\"nonce\"").count()
    }

    /// Dollars billed by the endpoints.
    fn billed(&self) -> f64 {
        let billed = self.mock.stats().billed;
        let prompts = 0.01 * billed.prompt_tokens as f64;
        (prompts + 2.0 * billed.completion_tokens as f64) / 1e6 + self.merged
    }

    fn check(&self) {
        let billed = self.billed();
        assert!(
            !self.is_bound || billed <= self.cap,
            "{billed} of {} is billed: {:#?}",
            self.cap,
            self.done
        );
    }

    fn ask(&mut self, command: &[&str]) {
        let mut child = self.start(&self.path("run"), &self.config, command);
        let after = self.random.u64(50..900);
        let is_killed = self.random.bool();
        if is_killed {
            std::thread::sleep(Duration::from_millis(after));
            // It may have come to its end.
            let _ = child.kill();
        }
        let errors = end(child, Duration::from_millis(4_000));
        self.done
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

    /// A disk takes the end of the cache, or a byte of it.
    fn cut_and_repair(&mut self) {
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
        self.cache(&["repair", "--dir"]);
        self.done
            .push(format!("cut to {length} bytes and repaired"));
    }

    fn delete_cache(&mut self) {
        if self.path("run/cache").exists() {
            std::fs::remove_dir_all(self.path("run/cache")).unwrap();
            self.done.push("deleted the cache".into());
        }
    }

    /// Another machine has asked another teacher; what its answers cost counts here from now on.
    fn merge(&mut self) {
        if !self.is_priced {
            return;
        }
        self.merges += 1;
        let other = self.path(&format!("other-{}", self.merges));
        let server = self
            .runtime
            .block_on(Server::start("[answers]\ntokens = [5, 60]"));
        let own = self
            .config
            .lines()
            .find(|line| line.contains("base_url"))
            .unwrap();
        let theirs = format!("base_url = \"http://{}/v1\"", server.address);
        let config = self.config.replace(own, &theirs);
        let errors = end(
            self.start(&other, &config, &["harvest", "--limit", "5"]),
            Duration::from_secs(10),
        );
        let records = distill::cache::reader::read(&other.join("cache")).expect(&errors);
        let costs = records.map(|record| record.unwrap().cost_usd.unwrap());
        self.merged += costs.sum::<f64>();
        self.is_bound = false;
        self.cache(&["merge", other.join("cache").to_str().unwrap(), "--dir"]);
        self.done.push(format!("merged, now {}", self.merged));
    }

    fn cache(&self, command: &[&str]) {
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

/// Waits for the process, kills it where it takes longer, and returns what it wrote to stderr.
fn end(mut child: Child, longest: Duration) -> String {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > longest {
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
            "seed {seed}: ${:.4} billed of ${:.4}, {} steps within it",
            folder.billed(),
            folder.cap,
            folder.steps_within
        );
    }
}
