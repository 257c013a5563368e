//! [`TextScorer`]: the teacher's logprobs of given texts, for on-policy training.

use anyhow::Result;

use crate::cache::logprobs_view::LogprobsView;
use crate::prompt::Prompt;
use crate::signal::StopFlag;

/// A teacher behind an API that scores given texts.
pub trait TextScorer: Send {
    /// Scores the last message of each conversation. Returns its logprobs, in order; None for a text that the teacher
    /// could not score.
    ///
    /// # Errors
    /// If the teacher is no longer available, or `stop` is set.
    fn score(
        &mut self,
        texts: Vec<Prompt>,
        stop: &StopFlag,
    ) -> Result<Vec<Option<LogprobsView<'static>>>>;
}
