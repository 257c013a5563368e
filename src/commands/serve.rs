//! `distill serve`: an OpenAI-compatible server over a local model, or a mock teacher.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::runtime::Builder;

use super::{print, print_json};
use crate::cli::{GlobalArgs, ServeArgs};
use crate::exit::Exit;
use crate::mock::script::Script;
use crate::mock::stats::MockStats;
use crate::serve::{self, ServeOptions, Server};
use crate::signal::Signals;
use crate::terminal::{format_count, table};

/// Serves the model or the mock of the command line until a signal arrives.
///
/// # Errors
/// Always: [`Exit::Signal`] after a signal, or an error if the server cannot start or one of its threads has panicked.
pub fn run(args: &ServeArgs, global: &GlobalArgs) -> Result<()> {
    match (&args.mock, &args.model) {
        (Some(script), _) => run_mock(script, args, global),
        (None, Some(model)) => run_model(model, args, global),
        (None, None) => Err(Exit::Usage("give --model DIR or --mock FILE".into()).into()),
    }
}

fn run_model(model: &Path, args: &ServeArgs, global: &GlobalArgs) -> Result<()> {
    let server = serve::start(
        model,
        ServeOptions {
            host: args.host,
            port: args.port,
            model_name: args.name.clone(),
            batch_size: args.batch_size,
            queue: args.queue,
        },
    )?;
    if !args.host.is_loopback() {
        tracing::warn!(
            "the server has no authentication: anyone who can reach {} can use the model",
            args.host
        );
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    // Listen before the announcement: a script may send a signal as soon as it has read the URL.
    let signals = runtime.block_on(async { Signals::listen() })?;
    announce(&server.base_url(), server.model_name(), global)?;
    let signal = runtime.block_on(wait_and_shut_down(server, signals))?;
    // After a second signal, the shutdown task may still run: the runtime must not wait for it.
    runtime.shutdown_background();
    Err(Exit::Signal(signal).into())
}

/// Serves the mock until a signal arrives, and then prints its statistics.
fn run_mock(script: &Path, args: &ServeArgs, global: &GlobalArgs) -> Result<()> {
    let script = Script::load(script)?;
    let model = script.model_name().to_string();
    let server = crate::mock::server::start(script, args.host, args.port)?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    announce(&server.base_url(), &model, global)?;
    let signal = runtime
        .block_on(signals.next())
        .context("cannot wait for signals")?;
    let stats = server.stop();
    if global.json {
        print_json(&json!({"version": 1, "stats": stats}))?;
    } else {
        print(&table(&stats_rows(&stats)))?;
    }
    Err(Exit::Signal(signal).into())
}

/// Prints the server's URL. Scripts wait for this line.
fn announce(base_url: &str, model: &str, global: &GlobalArgs) -> Result<()> {
    tracing::info!("serving `{model}`; press Ctrl-C to stop");
    if global.json {
        print_json(&json!({"version": 1, "base_url": base_url, "model": model}))
    } else {
        print(&format!("listening on {base_url}\n"))
    }
}

/// Waits for a signal, and then until the running answers are finished or a second signal arrives. Returns the number
/// of the first signal.
///
/// # Errors
/// If a thread of the server ends before a signal, fails or panics.
async fn wait_and_shut_down(server: Server, mut signals: Signals) -> Result<u8> {
    let signal = tokio::select! {
        signal = signals.next() => signal.context("cannot wait for signals")?,
        () = server.ended() => {
            tokio::task::spawn_blocking(|| server.shutdown()).await??;
            bail!("the server has stopped unexpectedly: start it again");
        }
    };
    tracing::info!("finishing the running answers; press Ctrl-C again to stop immediately");
    tokio::select! {
        result = tokio::task::spawn_blocking(|| server.shutdown()) => result??,
        _ = signals.next() => {}
    }
    Ok(signal)
}

/// Returns the table rows of the statistics of a mock.
fn stats_rows(stats: &MockStats) -> Vec<[String; 2]> {
    let row = |name: &str, count: u64| [name.to_string(), format_count(count)];
    let billed = &stats.billed;
    let mut rows = vec![
        row("connections", stats.connections),
        row("requests", stats.requests),
        row("  answered", stats.answered),
        row("  throttled", stats.throttled),
        row("  abandoned", stats.abandoned),
    ];
    let by_status = stats.by_status.iter();
    rows.extend(by_status.map(|(status, count)| row(&format!("  status {status}"), *count)));
    let faults = stats.faults.iter();
    rows.extend(faults.map(|(kind, count)| row(&format!("  fault: {kind}"), *count)));
    rows.extend([
        row("max in flight", stats.max_in_flight),
        row("max requests in a minute", stats.most_requests_in_a_minute),
        row(
            "max tokens requested in a minute",
            stats.most_tokens_asked_in_a_minute,
        ),
        row(
            "max tokens billed in a minute",
            stats.most_tokens_billed_in_a_minute,
        ),
        row("billed answers", billed.answers),
        row("  in batches", billed.batch_answers),
        row("  prompt tokens", billed.prompt_tokens),
        row("  cached tokens", billed.cached_tokens),
        row("  completion tokens", billed.completion_tokens),
        row("  reasoning tokens", billed.reasoning_tokens),
        row("distinct request bodies", stats.bodies),
    ]);
    let bodies = stats.bodies_by_times_billed.iter();
    rows.extend(bodies.map(|(times, count)| row(&format!("  billed {times} times"), *count)));
    rows
}
