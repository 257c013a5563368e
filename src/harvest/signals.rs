//! Ctrl-C and SIGTERM.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

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
