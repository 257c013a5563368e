//! Command-line arguments: clap types only.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::demo;
use crate::plan::shard::RequestShard;

/// Exit statuses in the help; see [`crate::exit::Exit`].
const EXIT_STATUS: &str = "\
Exit status:
  0    done
  1    failed; the message says what to do
  2    the command line, the config or the input files must be changed first
  3    done, but some rows failed: see failures.jsonl
  4    stopped by the budget, a deadline, a limit or an outage; rerun the command to resume
  5    a cache, ledger, journal or checkpoint is damaged or newer than this version; continuing could lose data
  129, 130, 143  stopped by a hang-up, Ctrl-C or SIGTERM; rerun the command to resume, `train` with --resume";

/// Distill a hosted model into a small one that you own
///
/// `distill harvest` collects the teacher's answers, within limits, in a crash-safe cache; `distill train`
/// fine-tunes a student on them. `distill demo` runs the whole pipeline on this machine.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXIT_STATUS)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// The whole pipeline on this machine: no key, no network, a few minutes
    Demo(DemoArgs),
    /// Request every answer that is not in the cache from the teacher
    Harvest(HarvestArgs),
    /// Test what the endpoint supports, with 11 to 19 cheap requests
    ///
    /// The requests count against the budget. They are sent immediately: `[schedule]` and `[limits]` do not apply.
    Probe(ProbeArgs),
    /// Train the student on the cache, or on a file of conversations
    Train(TrainArgs),
    /// Evaluate the student against held-out answers and against its teacher
    Eval(EvalArgs),
    /// Serve a local model over the OpenAI API, or a mock teacher for trial runs
    Serve(ServeArgs),
    /// Answer one prompt with a local model, or chat with it
    Generate(GenerateArgs),
    /// Inspect training examples
    Data(DataArgs),
    /// Split a text into the tokens of a model
    Tokenize(TokenizeArgs),
    /// Inspect, repair, merge or export a cache
    Cache(CacheArgs),
    /// Show the effective config
    Config(ConfigArgs),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
}

/// Flags that select the config.
#[derive(Debug, Clone, Args)]
pub struct ConfigFile {
    /// The config file; config.example.toml documents every key
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    pub file: PathBuf,
    /// Override one value, such as `train.steps=100`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Clone, Args)]
#[command(allow_negative_numbers = true)]
pub struct DemoArgs {
    /// Run folder; a demo that was stopped resumes in it
    #[arg(long, value_name = "DIR", default_value = "demo")]
    pub dir: PathBuf,
    /// Prompts to harvest, of the 12,000 that ship
    #[arg(long, value_name = "N", default_value_t = demo::PROMPTS, value_parser = clap::value_parser!(u32).range(1..=i64::from(demo::PROMPTS)))]
    pub prompts: u32,
    /// Held-out prompts to evaluate on, of the 600 that ship
    #[arg(long, value_name = "N", default_value_t = demo::HELDOUT, value_parser = clap::value_parser!(u32).range(1..=i64::from(demo::HELDOUT)))]
    pub heldout: u32,
    /// Optimizer steps of each student
    #[arg(long, value_name = "N", default_value_t = 1500)]
    pub steps: u64,
    /// Port of the teacher on loopback; 0 selects a free port
    #[arg(long, default_value_t = 8017)]
    pub port: u16,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = EXIT_STATUS, allow_negative_numbers = true)]
pub struct HarvestArgs {
    #[command(flatten)]
    pub config: ConfigFile,
    /// Show what would be requested and what it would cost; send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Use only the first N prompts
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Request only these answers again (comma-separated): length (truncated), quarantined, a reason that the summary
    /// lists under quarantined, or failed (rows that used up retry.max_attempts paid attempts or were refused by a
    /// content filter). The command without --again retries all other failed rows. Old answers move to
    /// responses.replaced.jsonl
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    pub again: Vec<String>,
    /// Request only the I-th of N disjoint parts; each part needs its own machine or run_dir, and
    /// `distill cache merge` joins them
    #[arg(long, value_name = "I/N")]
    pub shard: Option<RequestShard>,
}

#[derive(Debug, Clone, Args)]
pub struct ProbeArgs {
    #[command(flatten)]
    pub config: ConfigFile,
}

#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigFile,
    /// Resume from the newest checkpoint
    #[arg(long, conflicts_with = "fresh")]
    pub resume: bool,
    /// Delete existing checkpoints and start over
    #[arg(long)]
    pub fresh: bool,
    /// Train even if the logprobs do not match their answers, or few of them are usable
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub config: ConfigFile,
}

#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    #[command(subcommand)]
    pub action: CacheAction,
}

#[derive(Debug, Clone, Subcommand)]
pub enum CacheAction {
    /// Count records, tokens, dollars and bytes
    Stats(CacheLocation),
    /// Check the whole cache for damage
    Verify(CacheLocation),
    /// Move damaged records aside, so that their prompts are requested again
    Repair(CacheLocation),
    /// Copy the records of other caches into this one
    Merge {
        #[command(flatten)]
        location: CacheLocation,
        /// Cache folders to copy from; they are not changed
        #[arg(required = true, value_name = "DIR")]
        sources: Vec<PathBuf>,
    },
    /// Assign cached answers from another address, or of an earlier version, to the config's questions
    Adopt(ConfigFile),
    /// Print records
    Show {
        #[command(flatten)]
        location: CacheLocation,
        /// Key (or a prefix of it) or prompt id [default: the first records, up to `--limit`]
        record: Option<String>,
        /// Print at most N records
        #[arg(long, value_name = "N", default_value_t = 10)]
        limit: usize,
    },
    /// Write the usable answers in the format of another trainer
    Export(ExportArgs),
}

#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub location: CacheLocation,
    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub to: ExportFormat,
    /// Output path: a folder for `hf`, else a file
    #[arg(short = 'o', long = "out", value_name = "OUT")]
    pub out: PathBuf,
    /// Groups to write instead of `data.groups`: "all" (except groups of a mock), or ids, models and teachers
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    pub groups: Vec<String>,
    /// The teacher's model folder (tokenizer.json, chat template), which `axolotl` needs
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Replace an existing export
    #[arg(long)]
    pub force: bool,
}

/// Format of an export.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ExportFormat {
    /// A Hugging Face dataset: train.jsonl and a card
    Hf,
    /// JSONL of conversations for OpenAI's fine-tuning API
    OpenaiFt,
    /// JSONL of prompts and completions for TRL's SFTTrainer
    Trl,
    /// JSONL with top-k logprobs for axolotl's KD plugin
    Axolotl,
    /// One Parquet file with logprobs, usage and cost
    Parquet,
}

/// A cache folder, selected directly or by the config of its run.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct CacheLocation {
    /// The config of the run
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The cache folder itself
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    pub action: ConfigAction,
}

#[derive(Debug, Clone, Subcommand)]
pub enum ConfigAction {
    /// Show every value and its origin
    Show(ConfigFile),
}

/// Flags of all commands.
#[derive(Debug, Clone, Default, Args)]
pub struct GlobalArgs {
    /// Print the result as one JSON object
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Model folder (Hugging Face layout)
    #[arg(long, value_name = "DIR", required_unless_present = "mock")]
    pub model: Option<PathBuf>,
    /// Serve a mock teacher with the limits, latency and faults of this script instead of a model;
    /// tests/mock/example.toml documents every key
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "name", "batch_size", "queue"])]
    pub mock: Option<PathBuf>,
    /// Address to listen on; the server does not authenticate clients
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_parser = parse_host)]
    pub host: IpAddr,
    /// Port to listen on; 0 selects a free port
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Model name in requests [default: the folder's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Number of answers generated in one batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch_size: usize,
    /// Maximum number of waiting answers; further requests get 503
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub queue: usize,
}

/// Parses an IP address or `localhost`.
fn parse_host(text: &str) -> Result<IpAddr, String> {
    if text == "localhost" {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let invalid = |_| "expected an IP address of this machine, such as 127.0.0.1".to_owned();
    text.parse().map_err(invalid)
}

#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    #[command(subcommand)]
    pub command: DataCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub enum DataCommand {
    /// Show examples token by token, with the loss mask and the soft labels of each position
    ///
    /// Tokens are separated by `|`; supervised tokens are between `>>>` and `<<<`.
    Show(ShowDataArgs),
}

#[derive(Debug, Clone, Args)]
pub struct ShowDataArgs {
    #[command(flatten)]
    pub config: ConfigFile,
    /// Key of a record (at least its first six digits), prompt id, or line number in the file of conversations
    /// [default: the first usable examples]
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Maximum number of examples [default: 1 without --id]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
}

#[derive(Debug, Clone, Args)]
pub struct TokenizeArgs {
    /// Model folder (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Treat the text as a user message, and show the prompt rendered by the chat template
    #[arg(long)]
    pub chat: bool,
    /// The text; `-` reads it from stdin
    pub text: String,
}

#[derive(Debug, Clone, Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    /// Model folder (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Sampling temperature; 0 selects the most likely token at each step
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample among the most likely tokens up to this cumulative probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the sampling [default: a random seed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Maximum length of the answer in tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_tokens: usize,
    /// The prompt; `-` reads it from stdin [default: a chat on the terminal]
    pub prompt: Option<String>,
}
