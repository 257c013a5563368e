//! [`Exit`]: the exit status of the program.
//!
//! A function that fails in a way that scripts must distinguish returns an [`Exit`] inside its `anyhow::Error`.
//! Every other error has the exit status 1.

/// Reason for an exit status other than 0 or 1.
#[derive(Debug, thiserror::Error)]
pub enum Exit {
    /// 2: the user must change the command line, the config or the input files first.
    #[error("{0}")]
    Usage(String),
    /// 3: the run finished, and some rows failed.
    #[error("{0}")]
    SomeFailed(String),
    /// 4: stopped by the budget, a deadline, a limit or an outage; rerun the command to resume.
    #[error("{0}")]
    Resumable(String),
    /// 5: a cache, ledger, journal or checkpoint is damaged or newer than this version, and continuing could lose data.
    #[error("{0}")]
    Damaged(String),
    /// 129, 130 or 143 (128 + the signal's number): stopped cleanly after SIGHUP, Ctrl-C or SIGTERM.
    #[error("stopped by a signal")]
    Signal(u8),
}

impl Exit {
    /// Returns the exit status of the process.
    pub fn code(&self) -> u8 {
        match self {
            Exit::Usage(_) => 2,
            Exit::SomeFailed(_) => 3,
            Exit::Resumable(_) => 4,
            Exit::Damaged(_) => 5,
            Exit::Signal(number) => 128 + number,
        }
    }

    /// Returns the number of the signal if `error` is an [`Exit::Signal`], with or without context.
    pub(crate) fn signal_of(error: &anyhow::Error) -> Option<u8> {
        match error.downcast_ref::<Exit>()? {
            Exit::Signal(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns the exit status for an error: the status of the [`Exit`] in its chain, or 1.
    pub fn code_of(error: &anyhow::Error) -> u8 {
        error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Exit>())
            .map_or(1, Exit::code)
    }
}
