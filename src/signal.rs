//! Ctrl-C and SIGTERM, for work that is not asynchronous.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};

use crate::exit::Exit;

/// Has the user asked the program to stop?
#[derive(Clone)]
pub struct StopFlag(Arc<AtomicU8>);

impl StopFlag {
    /// Watches for signals from here on. The first one sets the flag; the second ends the process
    /// at once.
    ///
    /// # Errors
    /// Where the handlers cannot be installed.
    pub fn watch() -> Result<Self> {
        static FLAG: OnceLock<StopFlag> = OnceLock::new();
        if let Some(flag) = FLAG.get() {
            return Ok(flag.clone());
        }
        let flag = StopFlag(Arc::default());
        let number = Arc::clone(&flag.0);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot watch for signals")?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                loop {
                    let signal = next_signal().await;
                    if number.swap(signal, Ordering::Relaxed) != 0 {
                        std::process::exit(128 + i32::from(signal));
                    }
                }
            });
        });
        Ok(FLAG.get_or_init(|| flag).clone())
    }

    /// An error with the signal's exit status once a signal has come.
    ///
    /// # Errors
    /// Where a signal has come.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => bail!(Exit::Signal(number)),
        }
    }
}

#[cfg(unix)]
async fn next_signal() -> u8 {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = terminate.recv() => 15,
            _ = tokio::signal::ctrl_c() => 2,
        },
        Err(_) => {
            let _ = tokio::signal::ctrl_c().await;
            2
        }
    }
}

#[cfg(not(unix))]
async fn next_signal() -> u8 {
    let _ = tokio::signal::ctrl_c().await;
    2
}
