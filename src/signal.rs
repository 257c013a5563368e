//! Ctrl-C, SIGTERM and the hang-up of a terminal: as a stream for async code, as a flag for the rest.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::exit::Exit;
use crate::ops::process;

/// How often async code looks at the flag.
const LOOK_AT_FLAG: Duration = Duration::from_millis(50);

/// A signal that follows another one this closely is the same wish: `timeout` and some terminals send one
/// to the process and one to its group.
const SAME_WISH: Duration = Duration::from_secs(1);

/// Signals that ask the run to end: the first one to drain, the second one to stop at once.
pub struct Signals {
    numbers: UnboundedReceiver<u8>,
    flag: StopFlag,
}

impl Signals {
    /// Those of this process, but for the hang-up where it was started to ignore it, as by `nohup`. From here on
    /// they no longer end it by themselves.
    pub fn listen() -> Result<Signals> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ];
        let (sender, numbers) = unbounded_channel();
        let flag = StopFlag::default();
        let last: Arc<Mutex<Option<Instant>>> = Arc::default();
        for kind in kinds {
            // A script's background jobs have Ctrl-C ignored as well, and are to be stopped by it all the same.
            if kind == SignalKind::hangup() && process::is_signal_ignored(kind.as_raw_value()) {
                continue;
            }
            let mut signals = signal(kind).context("cannot listen for signals")?;
            let (sender, flag, last) = (sender.clone(), flag.clone(), Arc::clone(&last));
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    let now = Instant::now();
                    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                    let is_same = last.is_some_and(|last| now - last < SAME_WISH);
                    if is_same {
                        continue;
                    }
                    *last = Some(now);
                    flag.0.store(number(kind), Ordering::Relaxed);
                    if sender.send(number(kind)).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Signals { numbers, flag })
    }

    /// Those that are sent through a channel.
    pub fn from_channel(numbers: UnboundedReceiver<u8>) -> Signals {
        Signals {
            numbers,
            flag: StopFlag::default(),
        }
    }

    /// Set once one of them has come, for code that does not wait.
    pub fn flag(&self) -> &StopFlag {
        &self.flag
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
#[derive(Clone, Default)]
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
        let flag = StopFlag::default();
        let number = Arc::clone(&flag.0);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot watch for signals")?;
        let mut signals = {
            let _guard = runtime.enter();
            Signals::listen()?
        };
        std::thread::spawn(move || {
            runtime.block_on(async {
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
        let flag = self.clone();
        tokio::spawn(async move {
            while !sender.is_closed() {
                let number = flag.0.load(Ordering::Relaxed);
                if number != 0 {
                    let _ = sender.send(number);
                    // Kept open, as the receiver would otherwise hear of the end again and again.
                    return sender.closed().await;
                }
                tokio::time::sleep(LOOK_AT_FLAG).await;
            }
        });
        Signals {
            numbers,
            flag: self.clone(),
        }
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
        for (name, number) in [("-TERM", 15), ("-INT", 2), ("-HUP", 1)] {
            // As under `nohup`.
            if number == 1 && process::is_signal_ignored(number.into()) {
                continue;
            }
            assert!(number == 15 || signals.flag().check().is_err());
            // Another one at once would be the same wish.
            tokio::time::sleep(SAME_WISH).await;
            let status = std::process::Command::new("kill")
                .args([name, &pid])
                .status();
            assert!(status.unwrap().success());
            assert_eq!(signals.next().await, Some(number));
        }
    }
}
