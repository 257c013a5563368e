//! Parses the arguments, sets up logging, runs the command, and maps its result to an exit status.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use distill::cli::{Cli, Verb};
use distill::commands::{
    cache, completions, config, data, demo, eval, generate, harvest, probe, serve, tokenize, train,
};
use distill::exit::Exit;
use distill::{ops, terminal};

fn main() -> ExitCode {
    ops::process::configure();
    let cli = Cli::parse();
    distill::log::set_up();
    let global = &cli.global;
    let result = match &cli.verb {
        Verb::Demo(args) => demo::run(args, global),
        Verb::Harvest(args) => harvest::run(args, global),
        Verb::Probe(args) => probe::run(args, global),
        Verb::Train(args) => train::run(args, global),
        Verb::Eval(args) => eval::run(args, global),
        Verb::Serve(args) => serve::run(args, global),
        Verb::Generate(args) => generate::run(args, global),
        Verb::Data(args) => data::run(args, global),
        Verb::Tokenize(args) => tokenize::run(args, global),
        Verb::Cache(args) => cache::run(args, global),
        Verb::Config(args) => config::run(args, global),
        Verb::Completions { shell } => completions::run(*shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = Exit::code_of(&error);
            let text = format!("{error:#}");
            // A stop by a signal is not an error. Its status is 128 plus the number of the signal.
            let prefix = if code > 128 { "" } else { "error: " };
            // If stderr is closed, the exit status still shows the failure.
            let _ = writeln!(std::io::stderr(), "{prefix}{}", terminal::sanitise(&text));
            ExitCode::from(code)
        }
    }
}
