//! `distill demo`: the whole pipeline on this machine, using only the code of the other commands.
//!
//! The teacher and the prompts are contained in the program. They are written to the run folder, together with the
//! configs of the steps. Each step runs with its config and prints the equivalent command.

mod folder;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use crate::config::load;
use crate::eval;
use crate::eval::EvalReport;
use crate::exit::Exit;
use crate::harvest;
use crate::harvest::options::HarvestOptions;
use crate::serve::{self, ServeOptions, Server};
use crate::signal::StopFlag;
use crate::terminal::{format_count, table};
use crate::train::summary::StartMode;
use crate::train::{self, checkpoint};
use folder::{DemoFolder, Sizes};

/// Options of the demo.
#[derive(Debug, Clone)]
pub(crate) struct DemoOptions {
    /// The run folder.
    pub dir: PathBuf,
    /// Number of prompts to harvest.
    pub prompts: usize,
    /// Number of held-out prompts to evaluate on.
    pub heldout: usize,
    /// Number of optimizer steps of each student.
    pub steps: u64,
    /// Port of the teacher; 0 for any free port.
    pub port: u16,
}

/// Measurements of the demo.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DemoSummary {
    pub version: u32,
    pub dir: PathBuf,
    /// Rows of the table: teacher, students, untrained student.
    pub models: Vec<ModelEvaluation>,
}

/// Evaluation of one model.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ModelEvaluation {
    pub name: String,
    /// Size of `model.safetensors` in bytes.
    pub bytes: u64,
    pub report: EvalReport,
}

/// Contents of shipped files, by their path in the run folder.
macro_rules! shipped {
    ($($path:literal: $source:literal),* $(,)?) => {
        [$(($path, include_bytes!(concat!("../", $source)).as_slice())),*]
    };
}

/// Number of prompts that ship.
pub(crate) const PROMPTS: u32 = 12_000;

/// Number of held-out prompts that ship.
pub(crate) const HELDOUT: u32 = 600;

const SUMMARY: &str = "summary.json";

const FILES: [(&str, &[u8]); 9] = shipped! {
    "teacher/config.json": "datasets/reminders/teacher/config.json",
    "teacher/generation_config.json": "datasets/reminders/teacher/generation_config.json",
    "teacher/model.safetensors": "datasets/reminders/teacher/model.safetensors",
    "teacher/tokenizer.json": "datasets/reminders/teacher/tokenizer.json",
    "teacher/tokenizer_config.json": "datasets/reminders/teacher/tokenizer_config.json",
    "teacher/chat_template.jinja": "datasets/reminders/teacher/chat_template.jinja",
    "prompts.jsonl": "datasets/reminders/prompts.jsonl",
    "test.jsonl": "datasets/reminders/test.jsonl",
    "reminders.toml": "prompts/reminders.toml",
};

/// A student of the demo.
struct DemoStudent {
    /// Name of its config and its run folder.
    name: &'static str,
    /// Name in the table of results.
    title: &'static str,
    /// The `[loss]` section of its config; empty for the student that is not trained.
    loss: &'static str,
}

const STUDENTS: [DemoStudent; 3] = [
    DemoStudent {
        name: "kl",
        title: "student, KL",
        loss: "[loss]\nkd = \"auto\"\n",
    },
    DemoStudent {
        name: "ce",
        title: "student, CE only",
        loss: "[loss]\nkd = \"none\"\n",
    },
    DemoStudent {
        name: "untrained",
        title: "student, untrained",
        loss: "",
    },
];

/// Runs all steps of the demo: serves the teacher, harvests, trains and evaluates.
///
/// # Errors
/// If a step fails, or the run folder holds files that the demo did not write.
pub(crate) fn run(options: &DemoOptions, quiet: bool) -> Result<DemoSummary> {
    let stop = StopFlag::watch()?;
    let dir = &options.dir;
    let shipped = FILES.iter().map(|(name, _)| (*name).to_owned());
    let written = configs(options, "").into_iter().map(|(name, _)| name);
    let names: Vec<String> = shipped.chain(written).chain([SUMMARY.to_owned()]).collect();
    let sizes = Sizes {
        prompts: options.prompts,
        heldout: options.heldout,
        steps: options.steps,
    };
    let mut folder = DemoFolder::open(dir, names.iter().map(String::as_str), &FILES, sizes)?;
    for (name, bytes) in FILES {
        folder.write(name, bytes)?;
    }
    let teacher = start_teacher(options)?;
    for (name, text) in configs(options, &teacher.base_url()) {
        folder.write(&name, text.as_bytes())?;
    }
    let print = |text: String| {
        if !quiet {
            eprintln!("{text}");
        }
    };
    let config_path = |name: &str| dir.join(format!("{name}.toml"));
    let command = |verb: &str, name: &str| {
        stop.check()?;
        print(format!(
            "\n$ distill {verb} -c {}",
            config_path(name).display()
        ));
        load(&config_path(name), std::iter::empty(), &[]).map(|loaded| loaded.config)
    };
    print(format!(
        "$ distill serve --model {} --port {}",
        dir.join("teacher").display(),
        teacher.port()
    ));
    if options.port != 0 && teacher.port() != options.port {
        print(format!(
            "port {} is taken: the configs name port {} instead",
            options.port,
            teacher.port()
        ));
    }
    for name in ["harvest", "heldout"] {
        let config = command("harvest", name)?;
        let mut summary = block_on(harvest::run(
            &config,
            HarvestOptions {
                quiet,
                ..HarvestOptions::default()
            },
        ))?;
        // The advice names the next command, which the demo runs itself.
        summary.advice.clear();
        print(summary.to_table());
        summary.into_result()?;
    }
    teacher.shutdown()?;
    for student in STUDENTS {
        let config = command("train", student.name)?;
        let has_checkpoint = checkpoint::latest(&config.run_dir.join("checkpoints"))?.is_some();
        let start = if has_checkpoint {
            StartMode::Resume
        } else {
            StartMode::New
        };
        let options = train::TrainOptions {
            quiet,
            selection: crate::plan::questions::selection(&config)?,
            ..start.into()
        };
        train::run(&config, options).map_err(|error| match Exit::signal_of(&error) {
            // The advice of `distill train` names a flag that the demo does not have.
            Some(number) => anyhow!(Exit::Signal(number)).context("rerun the command to resume"),
            None => error,
        })?;
    }
    let mut models = Vec::new();
    let students = STUDENTS.map(|student| (student.name, student.title));
    for (name, title) in [("teacher", "teacher")].into_iter().chain(students) {
        let config = command("eval", name)?;
        let report = eval::run(
            &config,
            &|| crate::plan::questions::selection(&config),
            quiet,
        )?;
        models.push(ModelEvaluation {
            name: title.into(),
            bytes: weight_bytes(&report.model)?,
            report,
        });
    }
    let summary = DemoSummary {
        version: 1,
        dir: dir.clone(),
        models,
    };
    folder.write(SUMMARY, &serde_json::to_vec_pretty(&summary)?)?;
    print(String::new());
    Ok(summary)
}

/// Serves the shipped teacher, on any free port if the configured one is taken.
fn start_teacher(options: &DemoOptions) -> Result<Server> {
    let start = |port| {
        let serve = ServeOptions {
            port,
            batch_size: 64,
            ..ServeOptions::default()
        };
        serve::start(&options.dir.join("teacher"), serve)
    };
    start(options.port).or_else(|_| start(0))
}

/// Returns the file names and texts of the configs. A student's training and evaluation share one.
fn configs(options: &DemoOptions, base_url: &str) -> Vec<(String, String)> {
    let DemoOptions {
        prompts,
        heldout,
        steps,
        ..
    } = options;
    let harvest = |run_dir: &str, source: &str, limit: usize| {
        format!(
            "run_dir = \"{run_dir}\"\n\n\
             [teacher]\nname = \"demo\"\nbase_url = \"{base_url}\"\nmodel = \"teacher\"\napi_key_env = \"\"\n\n\
             [prompts]\nsource = \"{source}\"\ntemplate = \"reminders.toml\"\nlimit = {limit}\n\n\
             [sampling]\ntemperature = 1.0\ntop_logprobs = 20\nmax_tokens = 96\nseed = 1\n\n\
             [limits]\nconcurrency = 64\n"
        )
    };
    let eval = format!(
        "[prompts]\ntemplate = \"reminders.toml\"\n\n\
         [eval]\nsource = \"test.jsonl\"\nmatching = \"json\"\nlimit = {heldout}\n\
         teacher_cache = \"heldout/cache\"\nmax_tokens = 96\nbatch_size = 64\n"
    );
    let mut files = vec![
        ("harvest", harvest("harvest", "prompts.jsonl", *prompts)),
        ("heldout", harvest("heldout", "test.jsonl", *heldout)),
        ("teacher", format!("{eval}model = \"teacher\"\n")),
    ];
    for DemoStudent { name, loss, .. } in STUDENTS {
        let steps = if loss.is_empty() { 0 } else { *steps };
        let text = format!(
            "run_dir = \"{name}\"\n\n\
             [data]\ncache = \"harvest/cache\"\nvalidation_share = 0.05\n\n\
             [student]\ninit = \"random\"\npath = \"teacher\"\nhidden_size = 128\n\
             intermediate_size = 344\nnum_hidden_layers = 3\nnum_attention_heads = 4\n\
             num_key_value_heads = 2\nmax_position_embeddings = 512\n\n\
             {loss}\n\
             [train]\nsteps = {steps}\nbatch_size = 32\nmicro_batch_size = 32\n\
             learning_rate = 3e-3\nwarmup_steps = 50\neval_every = 200\n\n{eval}"
        );
        files.push((name, text));
    }
    let files = files.into_iter();
    files
        .map(|(name, text)| (format!("{name}.toml"), text))
        .collect()
}

fn weight_bytes(model: &Path) -> Result<u64> {
    let path = model.join("model.safetensors");
    let metadata = std::fs::metadata(&path);
    Ok(metadata
        .with_context(|| format!("cannot read {}", path.display()))?
        .len())
}

fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?
        .block_on(future)
}

/// Formats a divergence with four decimals. Rounding errors may leave it slightly below zero: adding 0.0 avoids
/// `-0.0000`.
fn four_decimals(value: f64) -> String {
    format!("{:.4}", (value * 1e4).round() / 1e4 + 0.0)
}

impl fmt::Display for DemoSummary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let header = [
            "",
            "parameters",
            "MB",
            "accuracy",
            "perplexity",
            "KL to teacher",
            "tokens/s",
        ];
        let mut rows = vec![header.map(String::from)];
        for model in &self.models {
            let truth = model.report.truth;
            let teacher = model.report.teacher;
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            rows.push([
                model.name.clone(),
                format_count(model.report.parameters as u64),
                format!("{:.1}", model.bytes as f64 / 1e6),
                or_dash(truth.map(|t| format!("{:.1} %", 100.0 * t.accuracy))),
                or_dash(
                    teacher
                        .and_then(|t| t.perplexity)
                        .map(|p| format!("{p:.3}")),
                ),
                or_dash(teacher.and_then(|t| t.kl).map(four_decimals)),
                or_dash(truth.map(|t| format!("{:.0}", t.tokens_per_s))),
            ]);
        }
        write!(f, "{}", table(&rows))?;
        writeln!(f, "\nthe run folder is {}", self.dir.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_counts_match_the_shipped_files() {
        for (name, count) in [("prompts.jsonl", PROMPTS), ("test.jsonl", HELDOUT)] {
            let (_, bytes) = FILES.iter().find(|(file, _)| *file == name).unwrap();
            assert_eq!(
                bytes.split(|byte| *byte == b'\n').count() - 1,
                count as usize
            );
        }
    }
}
