//! Ctrl-C, SIGTERM and SIGHUP: [`Signals`] is a stream for async code, [`StopFlag`] a flag for other code.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::exit::Exit;
use crate::ops::process;

/// Interval at which [`StopFlag::signals`] polls the flag.
const FLAG_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Time within which a second signal counts as a duplicate: `timeout` and some terminals send one signal to the
/// process and one to its group.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(1);

/// Stream of the signals that stop a run. After the first signal, the run waits for its open requests; after the second
/// one, it stops immediately.
pub struct Signals {
    numbers: UnboundedReceiver<u8>,
    flag: StopFlag,
}

impl Signals {
    /// Installs handlers for SIGINT, SIGTERM and SIGHUP, which then no longer end the process. SIGHUP stays ignored if
    /// the process was started that way, as by `nohup`.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub(crate) fn listen() -> Result<Signals> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ];
        let (sender, numbers) = unbounded_channel();
        let flag = StopFlag::default();
        let last_signal: Arc<Mutex<Option<Instant>>> = Arc::default();
        for kind in kinds {
            // SIGINT is handled even if the process was started with it ignored: shells start background jobs that way,
            // and they must stop cleanly too.
            if kind == SignalKind::hangup() && process::is_signal_ignored(kind.as_raw_value()) {
                continue;
            }
            let mut signals = signal(kind).context("cannot listen for signals")?;
            let (sender, flag) = (sender.clone(), flag.clone());
            let last_signal = Arc::clone(&last_signal);
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    let now = Instant::now();
                    let mut last_signal =
                        last_signal.lock().unwrap_or_else(PoisonError::into_inner);
                    if last_signal.is_some_and(|last| now - last < DUPLICATE_WINDOW) {
                        continue;
                    }
                    *last_signal = Some(now);
                    flag.0.store(number(kind), Ordering::Relaxed);
                    if sender.send(number(kind)).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Signals { numbers, flag })
    }

    /// Creates a stream that reads signal numbers from a channel instead of the operating system, for tests. Its flag
    /// is never set.
    pub fn from_channel(numbers: UnboundedReceiver<u8>) -> Signals {
        Signals {
            numbers,
            flag: StopFlag::default(),
        }
    }

    /// Returns a flag that is set after the first signal, for code that cannot await the stream.
    pub fn flag(&self) -> &StopFlag {
        &self.flag
    }

    /// Waits for the next signal and returns its number; `None` if the channel is closed.
    pub async fn next(&mut self) -> Option<u8> {
        self.numbers.recv().await
    }
}

/// Returns the number of the signal.
fn number(kind: SignalKind) -> u8 {
    u8::try_from(kind.as_raw_value()).unwrap_or_default()
}

/// A flag with the number of the last signal, or 0 before the first one.
#[derive(Clone, Default)]
pub struct StopFlag(Arc<AtomicU8>);

impl StopFlag {
    /// Installs the signal handlers once, and returns their flag. The first signal sets the flag; the second one ends
    /// the process immediately.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub(crate) fn watch() -> Result<Self> {
        static FLAG: OnceLock<StopFlag> = OnceLock::new();
        if let Some(flag) = FLAG.get() {
            return Ok(flag.clone());
        }
        let flag = StopFlag::default();
        let flag_number = Arc::clone(&flag.0);
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
                    if flag_number.swap(signal, Ordering::Relaxed) != 0 {
                        std::process::exit(128 + i32::from(signal));
                    }
                }
            });
        });
        Ok(FLAG.get_or_init(|| flag).clone())
    }

    /// Returns a stream that yields the first signal, for async code.
    pub fn signals(&self) -> Signals {
        let (sender, numbers) = unbounded_channel();
        let flag = self.clone();
        tokio::spawn(async move {
            while !sender.is_closed() {
                let number = flag.0.load(Ordering::Relaxed);
                if number != 0 {
                    let _ = sender.send(number);
                    // The channel stays open: on a closed channel, `next` would return `None` immediately.
                    return sender.closed().await;
                }
                tokio::time::sleep(FLAG_POLL_INTERVAL).await;
            }
        });
        Signals {
            numbers,
            flag: self.clone(),
        }
    }

    /// Returns an error if a signal was received.
    ///
    /// # Errors
    /// [`Exit::Signal`] with the number of the signal.
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
    async fn signals_are_received_and_do_not_end_the_process() {
        let mut signals = Signals::listen().unwrap();
        let pid = std::process::id().to_string();
        for (name, number) in [("-TERM", 15), ("-INT", 2), ("-HUP", 1)] {
            // Under `nohup`, SIGHUP stays ignored.
            if number == 1 && process::is_signal_ignored(number.into()) {
                continue;
            }
            assert!(number == 15 || signals.flag().check().is_err());
            // A signal within the window would count as a duplicate.
            tokio::time::sleep(DUPLICATE_WINDOW).await;
            let status = std::process::Command::new("kill")
                .args([name, &pid])
                .status();
            assert!(status.unwrap().success());
            assert_eq!(signals.next().await, Some(number));
        }
    }
}
