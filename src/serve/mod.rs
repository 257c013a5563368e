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

use crate::model::Model;
use crate::serve::state::AppState;
use crate::tokenizer::Tokenizer;

/// Number of hex digits of the model's fingerprint.
const FINGERPRINT_DIGITS: usize = 12;

/// Time limit of running answers after the beginning of a shutdown.
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
    threads: Vec<JoinHandle<()>>,
}

/// Signals that stop the HTTP thread.
#[derive(Debug, Clone)]
struct ShutdownTokens {
    /// Stops accepting connections; running answers finish.
    drain: CancellationToken,
    /// Also cancels running answers, and `drain`, its child token.
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
        .with_context(|| format!("cannot listen on {address}; choose another port"))?;
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
    let http = spawn_thread("http", move || {
        if let Err(error) = runtime.block_on(serving) {
            tracing::error!("the server failed: {error}");
        }
    })?;
    let engine = spawn_thread("model", move || {
        engine::run(&model, &tokenizer, options.batch_size, job_receiver);
    })?;
    Ok(Server {
        address,
        model_name,
        stop,
        threads: vec![http, engine],
    })
}

fn spawn_thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

impl Server {
    /// Base URL for clients: `http://127.0.0.1:PORT/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Model name that requests must use.
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Stops accepting connections, waits up to 30 seconds for running answers, and returns once all
    /// threads have ended. It blocks: in async code, call it from a blocking task.
    pub fn shutdown(mut self) -> Result<()> {
        self.stop.drain.cancel();
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_string();
            thread
                .join()
                .map_err(|_| anyhow!("the server's {name} thread panicked"))?;
        }
        Ok(())
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

/// Serves until a token of `stop` is cancelled; after `drain`, until the running answers have ended or
/// [`SHUTDOWN_TIMEOUT`] has passed. Then drops the router and, with it, the last sender of jobs, which ends the engine.
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
    let path = model_dir
        .canonicalize()
        .with_context(|| format!("cannot open the model folder {}", model_dir.display()))?;
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
