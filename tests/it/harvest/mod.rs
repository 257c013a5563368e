//! `distill harvest` against a teacher over real TCP, or against a simulated one on the paused clock.

mod bad_rows;
mod batch;
mod canary;
mod disk;
mod evidence;
mod faults;
mod groups;
mod keys;
mod limits;
mod matrix;
mod nights;
mod probe;
mod reach;
mod replies;
mod runs;
mod scoring;
#[cfg(feature = "redis")]
mod shared;
mod tls;

use std::time::Duration;

use distill::cache::record::Record;
use distill::config::{Config, OnMissingLogprobs};
use distill::exit::Exit;
use distill::harvest;
use distill::harvest::options::HarvestOptions;
use distill::plan::adopt::Adopted;
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::mpsc::unbounded_channel;

use crate::fault_server::{FaultServer, Reaction, RecordedRequest, answer};

/// A run folder with a config for a test server, with short delays between retries and without a key.
pub struct Run {
    pub dir: TempDir,
    pub config: Config,
}

impl Run {
    pub fn new(server: &FaultServer, prompts: &[&str]) -> Run {
        Run::at(&server.base_url, prompts)
    }

    /// Creates a run with the prompts `p0`, `p1`, ...
    pub fn with_numbered_prompts(server: &FaultServer, count: usize) -> Run {
        let run = Run::new(server, &[]);
        run.write_numbered_prompts(count);
        run
    }

    pub fn at(base_url: &str, prompts: &[&str]) -> Run {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            run_dir: dir.path().join("run"),
            ..Config::default()
        };
        config.teacher.base_url = base_url.into();
        config.teacher.model = "m".into();
        config.teacher.api_key_env = String::new();
        config.prompts.source = dir.path().join("prompts.txt");
        config.sampling.max_tokens = 16;
        // Many replies of the test servers have no logprobs.
        config.harvest.on_missing_logprobs = OnMissingLogprobs::Warn;
        config.retry.base = Duration::from_secs_f64(0.002);
        config.retry.max = Duration::from_secs_f64(0.02);
        config.retry.max_outage = Duration::from_secs_f64(0.5);
        let run = Run { dir, config };
        run.write("prompts.txt", &prompts.join("\n"));
        run
    }

    pub fn write(&self, name: &str, content: &str) {
        std::fs::write(self.dir.path().join(name), content).unwrap();
    }

    /// Writes the prompts `p0`, `p1`, ...
    pub fn write_numbered_prompts(&self, count: usize) {
        let lines: String = (0..count).map(|number| format!("p{number}\n")).collect();
        self.write("prompts.txt", &lines);
    }

    pub async fn harvest(&self) -> HarvestSummary {
        let (_sender, receiver) = unbounded_channel();
        self.try_harvest(Signals::from_channel(receiver))
            .await
            .unwrap()
    }

    /// Returns the error of a harvest that is refused before its first request.
    pub async fn harvest_error(&self) -> anyhow::Error {
        let (_sender, receiver) = unbounded_channel();
        self.try_harvest(Signals::from_channel(receiver))
            .await
            .unwrap_err()
    }

    pub async fn try_harvest(&self, signals: Signals) -> anyhow::Result<HarvestSummary> {
        let run = harvest::run_until(&self.config, quiet_options(), signals);
        let summary = tokio::time::timeout(Duration::from_secs(20), run)
            .await
            .expect("the run hangs")?;
        assert_adds_up(&summary);
        Ok(summary)
    }

    pub fn records(&self) -> Vec<Record> {
        let dir = self.config.run_dir.join("cache");
        if !distill::cache::exists(&dir) {
            return Vec::new();
        }
        distill::cache::read(&dir)
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    /// Returns the texts of all recorded answers, sorted.
    pub fn texts(&self) -> Vec<String> {
        let mut texts: Vec<_> = self
            .records()
            .into_iter()
            .map(|record| record.answer.text)
            .collect();
        texts.sort();
        texts
    }

    pub fn failures(&self) -> Vec<Value> {
        let lines = std::fs::read_to_string(self.config.run_dir.join("failures.jsonl")).unwrap();
        lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Runs `cache adopt` on the cache of the run folder.
pub fn adopt(config: &Config) -> anyhow::Result<Adopted> {
    let dir = config.own_cache();
    distill::plan::adopt::adopt(&config.prompts, &config.endpoints(), &dir, &config.cache)
}

/// Returns options without progress output.
pub fn quiet_options() -> HarvestOptions {
    HarvestOptions {
        quiet: true,
        ..HarvestOptions::default()
    }
}

/// Checks that the counts of the possible outcomes add up to the number of rows.
#[track_caller]
pub fn assert_adds_up(summary: &HarvestSummary) {
    let parts = [
        summary.cached,
        summary.ok,
        summary.quarantined,
        summary.failed,
        summary.pending,
    ];
    assert_eq!(parts.iter().sum::<u64>(), summary.total, "{summary:?}");
}

/// Returns the exit code of a run, and its error message, which is empty on success.
pub fn exit_of(summary: &HarvestSummary) -> (u8, String) {
    match &summary.error {
        Some(error) => (Exit::code_of(error), format!("{error:#}")),
        None => (0, String::new()),
    }
}

/// Returns the number of answered rows, of failed rows, and the exit code.
pub fn outcome(summary: &HarvestSummary) -> (u64, u64, u8) {
    (summary.ok, summary.failed, exit_of(summary).0)
}

/// Returns a script that sends `fault` for the first `times` requests of each body, then answers.
pub fn at_first(times: usize, fault: Reaction) -> impl Fn(&RecordedRequest) -> Reaction {
    move |seen| {
        if seen.repeat < times {
            fault.clone()
        } else {
            answer(seen)
        }
    }
}
