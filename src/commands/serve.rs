//! `distill serve`: an OpenAI-compatible server over a local model.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::runtime::Builder;

use crate::cli::{Global, ServeArgs};
use crate::exit::Exit;
use crate::serve::{self, ServeOptions, Server};
use crate::signal::Signals;

pub fn run(args: &ServeArgs, global: &Global) -> Result<()> {
    let server = serve::start(
        &args.model,
        ServeOptions {
            host: args.host,
            port: args.port,
            model_name: args.name.clone(),
            batch_size: args.batch_size,
            queue: args.queue,
        },
    )?;
    announce(&server, args, global)?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let number = runtime.block_on(until_stopped(server))?;
    // A second signal must not wait for the shutdown that it cuts short.
    runtime.shutdown_background();
    Err(Exit::Signal(number).into())
}

fn announce(server: &Server, args: &ServeArgs, global: &Global) -> Result<()> {
    let (base_url, model) = (server.base_url(), server.model_name());
    if !args.host.is_loopback() {
        tracing::warn!(
            "whoever reaches {} may use the model: there is no key",
            args.host
        );
    }
    tracing::info!("serving `{model}`; press Ctrl-C to stop");
    let mut stdout = std::io::stdout().lock();
    if global.json {
        let ready = json!({"version": 1, "base_url": base_url, "model": model});
        writeln!(stdout, "{ready}")?;
    } else {
        writeln!(stdout, "listening on {base_url}")?;
    }
    // A script waits for this line.
    Ok(stdout.flush()?)
}

/// Waits for Ctrl-C or SIGTERM, then for the answers under way or for a second signal. Returns the
/// number of the first.
async fn until_stopped(server: Server) -> Result<u8> {
    let mut signals = Signals::listen()?;
    let number = signals.next().await.context("cannot wait for signals")?;
    tracing::info!("stopping once the answers under way are done; once more stops at once");
    tokio::select! {
        stopped = tokio::task::spawn_blocking(|| server.shutdown()) => stopped??,
        _ = signals.next() => {}
    }
    Ok(number)
}
