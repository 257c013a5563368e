//! An OpenAI-compatible server over a local model.
//!
//! The server has two threads: one runs HTTP (axum), the other owns the model, whose forward passes all
//! requests share. It has neither authentication nor TLS: listen on loopback, or use a proxy.
//!
//! | file | content |
//! |---|---|
//! | `mod` | [`start`], [`Server`], shutdown |
//! | `app`, `state` | routes; the state that the handlers share |
//! | `chat`, `completions` | the handlers of the two completion routes |
//! | `request`, `fields` | parsing and validation of request bodies |
//! | `answers` | queues jobs and collects their results |
//! | `engine` | the thread that owns the model |
//! | `wire`, `error` | response bodies; error bodies |
//!
//! # Invariants
//!
//! 1. The answers of a request are either all queued or all rejected (503).
//! 2. The queue is bounded, and a disconnected client frees its slots.
//! 3. An invalid field is rejected with its name; unknown fields are ignored.
//!
//! [`crate::mock`] is another server for the same clients: a scripted teacher that fails on purpose.

pub(crate) mod answers;
pub(crate) mod app;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod engine;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod request;
pub(crate) mod state;
pub(crate) mod wire;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use axum::serve::ListenerExt;
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::exit::Exit;
use crate::model::Model;
use crate::serve::state::AppState;
use crate::tokenizer::Tokenizer;

/// Number of hex digits of the model's fingerprint.
const FINGERPRINT_DIGITS: usize = 12;

/// Time limit for running answers after the beginning of a shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of a server.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address to listen on.
    pub host: IpAddr,
    /// TCP port; 0 selects a free port (see [`Server::base_url`]).
    pub port: u16,
    /// Model name that requests must use; by default the name of the model folder.
    pub model_name: Option<String>,
    /// Maximum number of answers generated at the same time, at least 1.
    pub batch_size: usize,
    /// Maximum number of queued jobs (answers and texts to score), at least 1; further requests get 503.
    pub queue: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            host: Ipv4Addr::LOCALHOST.into(),
            port: 8000,
            model_name: None,
            batch_size: 16,
            queue: 1024,
        }
    }
}

/// A running server. It has its own threads, so that both synchronous and async code can use it.
/// Dropping it stops it immediately and cancels running answers.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    model_name: String,
    stop: ShutdownTokens,
    /// Cancelled when the first of the threads ends, also by a panic.
    ended: CancellationToken,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Signals that stop the HTTP thread.
#[derive(Debug, Clone)]
struct ShutdownTokens {
    /// Stops accepting connections; running answers finish.
    drain: CancellationToken,
    /// Cancels running answers and, because it is the parent token, also `drain`.
    immediate: CancellationToken,
}

/// Loads the model in `model_dir` (a Hugging Face folder), serves it, and returns once the server
/// accepts connections.
///
/// # Errors
/// If the address cannot be used, or the model or its tokenizer does not load.
pub fn start(model_dir: &Path, options: ServeOptions) -> Result<Server> {
    let model_name = match options.model_name {
        Some(name) => name,
        None => folder_name(model_dir)?,
    };
    let address = SocketAddr::new(options.host, options.port);
    // Bind before loading the model: loading is slow, and a port in use is a common error.
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; choose another --port or --host"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let model = Model::load(model_dir)?;
    let mut tokenizer = Tokenizer::load(model_dir)?;
    tokenizer.use_clock();
    let tokenizer = Arc::new(tokenizer);
    tokenizer.check_fits(model.config().vocab_size)?;
    let (job_sender, job_receiver) = mpsc::channel(options.queue.max(1));
    let router = app::router(AppState {
        model: model_name.clone(),
        fingerprint: fingerprint(model_dir)?,
        started: jiff::Timestamp::now().as_second(),
        context: model.config().max_position_embeddings,
        vocab_size: model.config().vocab_size.min(tokenizer.vocab_size()),
        tokenizer: Arc::clone(&tokenizer),
        jobs: job_sender,
    });
    let immediate = CancellationToken::new();
    let stop = ShutdownTokens {
        drain: immediate.child_token(),
        immediate,
    };
    let serving = serve_http(listener, router, stop.clone());
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let ended = CancellationToken::new();
    let http = spawn_thread("http", &ended, move || {
        runtime.block_on(serving).context("the server failed")
    })?;
    let engine = spawn_thread("model", &ended, move || {
        engine::run(&model, &tokenizer, options.batch_size, job_receiver);
        Ok(())
    })?;
    Ok(Server {
        address,
        model_name,
        stop,
        ended,
        threads: vec![http, engine],
    })
}

/// Starts a thread that cancels `ended` when it ends.
fn spawn_thread(
    name: &str,
    ended: &CancellationToken,
    run: impl FnOnce() -> Result<()> + Send + 'static,
) -> io::Result<JoinHandle<Result<()>>> {
    let guard = ended.clone().drop_guard();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let _guard = guard;
            run()
        })
}

impl Server {
    /// Base URL for clients, such as `http://127.0.0.1:8000/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Model name that requests must use.
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Waits until a thread of the server has ended. Before [`Server::shutdown`] this means that the server has failed:
    /// `shutdown` then returns the error.
    pub fn ended(&self) -> impl Future<Output = ()> + use<> {
        self.ended.clone().cancelled_owned()
    }

    /// Stops accepting connections, waits up to 30 seconds for running answers, and returns once all
    /// threads have ended. It blocks: in async code, call it from a blocking task.
    ///
    /// # Errors
    /// If a thread has failed or panicked.
    pub fn shutdown(mut self) -> Result<()> {
        self.stop.drain.cancel();
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_string();
            let panicked = |_| Err(anyhow!("the server's {name} thread panicked"));
            result = result.and(thread.join().unwrap_or_else(panicked));
        }
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.immediate.cancel();
        if let Err(error) = self.join() {
            tracing::error!("{error:#}");
        }
    }
}

/// Serves until `stop.immediate` is cancelled. After `stop.drain` is cancelled, serves only until the running answers
/// have ended or [`SHUTDOWN_TIMEOUT`] has passed. Then drops the router and, with it, the last sender of jobs, which
/// ends the engine.
async fn serve_http(
    listener: TcpListener,
    router: axum::Router,
    stop: ShutdownTokens,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?.tap_io(|stream| {
        // With Nagle's algorithm, small events would wait for the client to acknowledge earlier ones.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("cannot set TCP_NODELAY: {error}");
        }
    });
    let drain_begins = stop.drain.clone().cancelled_owned();
    let serving = axum::serve(listener, router).with_graceful_shutdown(drain_begins);
    let timed_out = async {
        stop.drain.cancelled().await;
        tokio::time::sleep(SHUTDOWN_TIMEOUT).await;
        tracing::warn!("answers still running after {SHUTDOWN_TIMEOUT:?} are cancelled");
    };
    tokio::select! {
        served = serving => served,
        () = timed_out => Ok(()),
        () = stop.immediate.cancelled() => Ok(()),
    }
}

/// Returns the last component of the model folder's path.
fn folder_name(model_dir: &Path) -> Result<String> {
    let path = model_dir.canonicalize().map_err(|error| {
        Exit::Usage(format!(
            "cannot open the model folder {}: {error}",
            model_dir.display()
        ))
    })?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok(name.to_string_lossy().into_owned())
}

/// Returns a hash of the config and the weights, by which clients detect that the model has changed.
fn fingerprint(model_dir: &Path) -> Result<String> {
    let is_model = |path: &Path| {
        path.ends_with("config.json")
            || path
                .extension()
                .is_some_and(|extension| extension == "safetensors")
    };
    let mut paths = Vec::new();
    for entry in model_dir.read_dir()? {
        paths.push(entry?.path());
    }
    paths.retain(|path| is_model(path));
    paths.sort();
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let mut file = File::open(&path)?;
        io::copy(&mut file, &mut hasher)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(format!(
        "fp_{}",
        &hasher.finalize().to_hex()[..FINGERPRINT_DIGITS]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a server without a model. Its HTTP thread waits for the shutdown, and its model thread runs `run`.
    fn server(run: impl FnOnce() -> Result<()> + Send + 'static) -> Server {
        let immediate = CancellationToken::new();
        let drain = immediate.child_token();
        let ended = CancellationToken::new();
        let drain_begins = drain.clone().cancelled_owned();
        let runtime = Builder::new_current_thread().build().unwrap();
        let http = spawn_thread("http", &ended, move || {
            runtime.block_on(drain_begins);
            Ok(())
        });
        let engine = spawn_thread("model", &ended, run);
        Server {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
            model_name: "tiny".into(),
            stop: ShutdownTokens { drain, immediate },
            ended,
            threads: vec![http.unwrap(), engine.unwrap()],
        }
    }

    #[tokio::test]
    async fn server_ends_with_the_error_of_a_dead_thread() {
        let panicking = server(|| panic!("out of memory"));
        panicking.ended().await;
        let error = panicking.shutdown().unwrap_err().to_string();
        assert_eq!(error, "the server's model thread panicked");

        let failing = server(|| Err(anyhow!("no device")));
        failing.ended().await;
        assert_eq!(failing.shutdown().unwrap_err().to_string(), "no device");
    }
}
