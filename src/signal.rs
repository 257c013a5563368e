//! Ctrl-C and SIGTERM: as a stream for async code, as a flag for the rest.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::exit::Exit;

/// How often async code looks at the flag.
const LOOK_AT_FLAG: Duration = Duration::from_millis(50);

/// Signals that ask the run to end: the first one to drain, the second one to stop at once.
pub struct Signals {
    numbers: UnboundedReceiver<u8>,
}

impl Signals {
    /// Those of this process. From here on they no longer end it by themselves.
    pub fn listen() -> Result<Signals> {
        let (sender, numbers) = unbounded_channel();
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let mut signals = signal(kind).context("cannot listen for signals")?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() && sender.send(number(kind)).is_ok() {}
            });
        }
        Ok(Signals { numbers })
    }

    /// Those that are sent through a channel.
    pub fn from_channel(numbers: UnboundedReceiver<u8>) -> Signals {
        Signals { numbers }
    }

    /// The number of the next signal; None if there will be none.
    pub async fn next(&mut self) -> Option<u8> {
        self.numbers.recv().await
    }
}

fn number(kind: SignalKind) -> u8 {
    u8::try_from(kind.as_raw_value()).unwrap_or_default()
}

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
                // An error leaves the signals their usual effect: they end the process.
                let Ok(mut signals) = Signals::listen() else {
                    return;
                };
                while let Some(signal) = signals.next().await {
                    if number.swap(signal, Ordering::Relaxed) != 0 {
                        std::process::exit(128 + i32::from(signal));
                    }
                }
            });
        });
        Ok(FLAG.get_or_init(|| flag).clone())
    }

    /// As a stream, for async code: the signal that has come or will.
    pub fn signals(&self) -> Signals {
        let (sender, numbers) = unbounded_channel();
        let flag = Arc::clone(&self.0);
        tokio::spawn(async move {
            while !sender.is_closed() {
                let number = flag.load(Ordering::Relaxed);
                if number != 0 {
                    let _ = sender.send(number);
                    // Kept open, as the receiver would otherwise hear of the end again and again.
                    return sender.closed().await;
                }
                tokio::time::sleep(LOOK_AT_FLAG).await;
            }
        });
        Signals { numbers }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_arrives_by_its_number_and_does_not_kill() {
        let mut signals = Signals::listen().unwrap();
        let pid = std::process::id().to_string();
        for (name, number) in [("-TERM", 15), ("-INT", 2)] {
            let status = std::process::Command::new("kill")
                .args([name, &pid])
                .status();
            assert!(status.unwrap().success());
            assert_eq!(signals.next().await, Some(number));
        }
    }
}
