//! An OpenAI-compatible server over a local model.
//!
//! Two threads: one runs HTTP (axum), the other owns the model (`engine`) and shares its forward
//! passes among all requests. There is no authentication and no TLS: listen on loopback, or put a
//! proxy in front.
//!
//! [`mock`] is another server for the same clients: a scripted teacher that fails on purpose.

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
use crate::serve::state::App;
use crate::tokenizer::Tokenizer;

/// How long answers under way may take after a shutdown began.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub struct ServeOptions {
    pub host: IpAddr,
    /// 0 takes a free port; see [`Server::base_url`].
    pub port: u16,
    /// The name that requests must ask for. None: the model folder's name.
    pub model_name: Option<String>,
    /// Answers generated at once.
    pub batch_size: usize,
    /// Answers that may wait for a slot; further requests get 503.
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

/// A running server. It has threads of its own, so it can be held from synchronous and from async
/// code alike. Dropping it stops it at once; answers under way are cut off.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    model_name: String,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

/// How the HTTP thread learns of the end.
#[derive(Debug, Clone)]
struct Stop {
    /// Accept no more connections, and finish the answers under way.
    drain: CancellationToken,
    /// Finish nothing. Implies `drain`, which is its child.
    at_once: CancellationToken,
}

/// Loads the model in `model_dir` (a Hugging Face folder) and serves it.
///
/// Returns once the server accepts connections.
pub fn start(model_dir: &Path, options: ServeOptions) -> Result<Server> {
    let model_name = match options.model_name {
        Some(name) => name,
        None => folder_name(model_dir)?,
    };
    let address = SocketAddr::new(options.host, options.port);
    // Before the model is loaded, since that takes long and a port in use is a common mistake.
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; choose another port"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let model = Model::load(model_dir)?;
    let mut tokenizer = Tokenizer::load(model_dir)?;
    tokenizer.use_clock();
    let tokenizer = Arc::new(tokenizer);
    tokenizer.check_fits(model.config().vocab_size)?;
    let (jobs, queue) = mpsc::channel(options.queue.max(1));
    let router = app::router(App {
        model: model_name.clone(),
        fingerprint: fingerprint(model_dir)?,
        started: jiff::Timestamp::now().as_second(),
        context: model.config().max_position_embeddings,
        tokens: model.config().vocab_size.min(tokenizer.vocab_size()),
        tokenizer: Arc::clone(&tokenizer),
        jobs,
    });
    let at_once = CancellationToken::new();
    let stop = Stop {
        drain: at_once.child_token(),
        at_once,
    };
    let serving = serve_http(listener, router, stop.clone());
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let http = thread("http", move || {
        if let Err(error) = runtime.block_on(serving) {
            tracing::error!("the server failed: {error}");
        }
    })?;
    let engine = thread("model", move || {
        engine::run(&model, &tokenizer, options.batch_size, queue);
    })?;
    Ok(Server {
        address,
        model_name,
        stop,
        threads: vec![http, engine],
    })
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

impl Server {
    /// For clients: `http://127.0.0.1:PORT/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The name that requests must ask for.
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Accepts no more connections, lets the answers under way finish (for up to 30 seconds), and
    /// returns when all is over. It blocks: in async code, call it from a blocking task.
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
        self.stop.at_once.cancel();
        if let Err(error) = self.join() {
            tracing::error!("{error:#}");
        }
    }
}

/// Serves until it is told to stop. The router goes with it, and with the router the last sender
/// of jobs, which ends the engine.
async fn serve_http(listener: TcpListener, router: axum::Router, stop: Stop) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?.tap_io(|stream| {
        // Without this, small events of a stream wait for the client's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("cannot set TCP_NODELAY: {error}");
        }
    });
    let drained = stop.drain.clone().cancelled_owned();
    let serving = axum::serve(listener, router).with_graceful_shutdown(drained);
    let overdue = async {
        stop.drain.cancelled().await;
        tokio::time::sleep(GRACE).await;
        tracing::warn!("answers still under way after {GRACE:?} are given up");
    };
    tokio::select! {
        served = serving => served,
        () = overdue => Ok(()),
        () = stop.at_once.cancelled() => Ok(()),
    }
}

/// The last part of the model folder's path.
fn folder_name(model_dir: &Path) -> Result<String> {
    let path = model_dir
        .canonicalize()
        .with_context(|| format!("cannot open the model folder {}", model_dir.display()))?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok(name.to_string_lossy().into_owned())
}

/// A hash of the config and the weights: a client that records it can tell that the model changed.
fn fingerprint(model_dir: &Path) -> Result<String> {
    let is_model = |path: &Path| {
        path.ends_with("config.json") || path.extension().is_some_and(|end| end == "safetensors")
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
    Ok(format!("fp_{}", &hasher.finalize().to_hex()[..12]))
}
