//! [`MockServer`]: a mock that serves TCP on its own thread.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

use crate::mock::script::Script;
use crate::mock::stats::MockStats;
use crate::mock::{Mock, http};

/// A running mock server, for synchronous and async code. Dropping it stops the server immediately.
#[derive(Debug)]
pub struct MockServer {
    address: SocketAddr,
    mock: Arc<Mock>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// Serves `script` on `host` and `port` (0 selects a free port). Returns once the server accepts
/// connections.
///
/// # Errors
/// If it cannot listen on the address.
pub fn start(script: Script, host: IpAddr, port: u16) -> Result<MockServer> {
    let address = SocketAddr::new(host, port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; choose another --port or --host"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let mut runtime = match script.threads {
        1 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    let runtime = runtime.enable_all().build()?;
    let mock = Arc::new(Mock::new(script));
    let stop = CancellationToken::new();
    let served_mock = Arc::clone(&mock);
    let stop_signal = stop.clone();
    let listener = {
        let _guard = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let thread = std::thread::Builder::new()
        .name("mock".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = http::serve(served_mock, listener) => {}
                    () = stop_signal.cancelled() => {}
                }
            });
        })?;
    Ok(MockServer {
        address,
        mock,
        stop,
        thread: Some(thread),
    })
}

impl MockServer {
    /// Returns the base URL for clients: `http://HOST:PORT/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn mock(&self) -> &Mock {
        &self.mock
    }

    /// Closes all connections and returns the stats.
    pub fn stop(mut self) -> MockStats {
        self.shut_down();
        self.mock.stats()
    }

    fn shut_down(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the mock's thread panicked");
        }
    }
}

impl Drop for MockServer {
    fn drop(&mut self) {
        self.shut_down();
    }
}
