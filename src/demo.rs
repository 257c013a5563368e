//! The whole pipeline on this machine, with the code of the verbs and nothing else.
//!
//! The teacher and the prompts ship inside the program. They are written into the run folder with
//! one config per step, each step is run from its config, and the equivalent commands are printed.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::config::load;
use crate::eval;
use crate::eval::Report;
use crate::fs;
use crate::harvest;
use crate::harvest::options::HarvestOptions;
use crate::serve::{self, ServeOptions, Server};
use crate::signal::StopFlag;
use crate::terminal::{format_count, table};
use crate::train::summary::Start;
use crate::train::{self, checkpoint};

#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The run folder.
    pub dir: PathBuf,
    /// Prompts to harvest.
    pub prompts: usize,
    /// Held-out prompts to evaluate on.
    pub heldout: usize,
    /// Optimizer steps of each student.
    pub steps: u64,
    /// Port of the teacher; 0 takes a free one.
    pub port: u16,
}

/// What the demo measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    pub version: u32,
    pub dir: PathBuf,
    /// Teacher, students, untrained student, in the order of the table.
    pub models: Vec<Evaluated>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Evaluated {
    pub name: String,
    /// Size of the weights in the model folder.
    pub bytes: u64,
    pub report: Report,
}

/// The shipped files, and where they go in the run folder.
macro_rules! shipped {
    ($($to:literal: $from:literal),* $(,)?) => {
        [$(($to, include_bytes!(concat!("../", $from)).as_slice())),*]
    };
}

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

/// The students: name of the config, name in the table, what differs in it.
const STUDENTS: [(&str, &str, &str); 3] = [
    ("kl", "student, KL", "[loss]\nkd = \"auto\"\n"),
    ("ce", "student, CE only", "[loss]\nkd = \"none\"\n"),
    ("untrained", "student, untrained", ""),
];

/// Serves the teacher, harvests, trains and evaluates.
///
/// # Errors
/// Where one of the verbs fails.
pub(crate) fn run(options: &Options, quiet: bool) -> Result<Outcome> {
    let stop = StopFlag::watch()?;
    let dir = &options.dir;
    for (name, bytes) in FILES {
        let path = dir.join(name);
        if std::fs::read(&path).ok().as_deref() != Some(bytes) {
            fs::create_dir_all(path.parent().unwrap_or(dir))?;
            fs::write_atomic(&path, bytes)?;
        }
    }
    let teacher = start_teacher(options)?;
    write_configs(options, &teacher.base_url())?;
    let say = |text: String| {
        if !quiet {
            eprintln!("{text}");
        }
    };
    let config_path = |name: &str| dir.join(format!("{name}.toml"));
    let command = |verb: &str, name: &str| {
        stop.check()?;
        say(format!(
            "\n$ distill {verb} -c {}",
            config_path(name).display()
        ));
        load(&config_path(name), std::iter::empty(), &[]).map(|loaded| loaded.config)
    };
    say(format!(
        "$ distill serve --model {} --port {}",
        dir.join("teacher").display(),
        options.port
    ));
    for name in ["harvest", "heldout"] {
        let config = command("harvest", name)?;
        let mut summary = block_on(harvest::run(
            &config,
            HarvestOptions {
                quiet,
                ..HarvestOptions::default()
            },
        ))?;
        // The demo itself takes the next step.
        summary.advice.clear();
        say(summary.to_table());
        summary.into_result()?;
    }
    teacher.shutdown()?;
    for (name, _, _) in STUDENTS {
        let config = command("train", name)?;
        let started = checkpoint::latest(&config.run_dir.join("checkpoints"))?.is_some();
        let start = if started { Start::Resume } else { Start::Ask };
        let options = train::Options {
            quiet,
            selection: crate::plan::questions::selection(&config)?,
            ..start.into()
        };
        train::run(&config, options)?;
    }
    let mut models = Vec::new();
    let names = STUDENTS.map(|(name, title, _)| (name, title));
    for (name, title) in [("teacher", "teacher")].into_iter().chain(names) {
        let config = command("eval", name)?;
        let report = eval::run(
            &config,
            &|| crate::plan::questions::selection(&config),
            quiet,
        )?;
        models.push(Evaluated {
            name: title.into(),
            bytes: weight_bytes(&report.model)?,
            report,
        });
    }
    let outcome = Outcome {
        version: 1,
        dir: dir.clone(),
        models,
    };
    fs::write_atomic(
        &dir.join("summary.json"),
        &serde_json::to_vec_pretty(&outcome)?,
    )?;
    say(String::new());
    Ok(outcome)
}

/// Serves the shipped teacher, on a free port where the wanted one is taken.
fn start_teacher(options: &Options) -> Result<Server> {
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

/// One config per step. The texts are what a user would write by hand.
fn write_configs(options: &Options, base_url: &str) -> Result<()> {
    let Options {
        prompts,
        heldout,
        steps,
        dir,
        ..
    } = options;
    let ask = |run_dir: &str, source: &str, limit: usize| {
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
        ("harvest", ask("harvest", "prompts.jsonl", *prompts)),
        ("heldout", ask("heldout", "test.jsonl", *heldout)),
        ("teacher", format!("{eval}model = \"teacher\"\n")),
    ];
    for (name, _, loss) in STUDENTS {
        let steps = if loss.is_empty() { 0 } else { *steps };
        let text = format!(
            "run_dir = \"{name}\"\n\n\
             [teacher]\nmodel = \"teacher\"\n\n\
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
    for (name, text) in files {
        fs::write_atomic(&dir.join(format!("{name}.toml")), text.as_bytes())?;
    }
    Ok(())
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

/// Rounding may leave a divergence of zero a little below it, and `-0.0000` is no number to show.
fn four_places(value: f64) -> String {
    format!("{:.4}", (value * 1e4).round() / 1e4 + 0.0)
}

impl fmt::Display for Outcome {
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
                or_dash(teacher.and_then(|t| t.kl).map(four_places)),
                or_dash(truth.map(|t| format!("{:.0}", t.tokens_per_s))),
            ]);
        }
        write!(f, "{}", table(&rows))?;
        writeln!(f, "\nthe run folder is {}", self.dir.display())
    }
}
