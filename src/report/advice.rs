//! Advice on the next steps after a run, derived from its summary. Pure.

use std::path::Path;

use crate::exit::Exit;
use crate::plan::run_settings::TrainingObstacle;
use crate::report::summary::HarvestSummary;
use crate::terminal::{after_space, format_count, format_share};

/// Exit status of [`Exit::SomeFailed`].
const SOME_FAILED: u8 = 3;

/// Advice on refused or cut-off answers, or on answers without logprobs, is given if more than 1 in this number of
/// answers is affected.
const MIN_ANSWERS_PER_PROBLEM: u64 = 20;

/// Advice on throttled requests is given if more than 1 in this number of requests was throttled.
const MIN_REQUESTS_PER_THROTTLED: u64 = 100;

/// Share of the rate limit below which a higher concurrency is advised.
const LOW_LIMIT_USE: f64 = 0.5;

/// Minimum duration in seconds of a run whose use of the rate limit is judged.
const MIN_SECONDS: f64 = 600.0;

/// Returns one sentence per step, the most urgent first. `failures` is the path of `failures.jsonl`.
pub(crate) fn next_steps(summary: &HarvestSummary, failures: &Path) -> Vec<String> {
    let mut steps = Vec::new();
    let config = after_space(&summary.arguments);
    let answers = summary.ok + summary.quarantined;
    let mut step = |is_needed: bool, text: String| {
        if is_needed {
            steps.push(text);
        }
    };
    // The message of any other error names the next step itself, such as a change before the rerun.
    let can_rerun = summary.error.as_ref().is_none_or(|error| {
        Exit::signal_of(error).is_some() || Exit::code_of(error) == SOME_FAILED
    });
    step(
        summary.pending > 0 && can_rerun,
        format!(
            "rerun the command: {} rows are pending, and cached answers are not requested again",
            format_count(summary.pending)
        ),
    );
    step(
        summary.failed > 0,
        format!("see {}: {}", failures.display(), retry_advice(summary)),
    );
    let refusals = summary.quarantines.get("refusal").copied().unwrap_or(0);
    step(
        refusals * MIN_ANSWERS_PER_PROBLEM > answers,
        format!(
            "the teacher refused {} of the questions, and refusals are not used for training: `distill \
             harvest{config} --again refusal` requests these answers again",
            format_share(refusals, answers)
        ),
    );
    step(
        summary.cut_off * MIN_ANSWERS_PER_PROBLEM > answers,
        format!(
            "raise `sampling.max_tokens`, which cut off {} of the answers, and rerun the command: only these answers are requested again",
            format_share(summary.cut_off, answers)
        ),
    );
    step(
        summary.not_kept * MIN_ANSWERS_PER_PROBLEM > answers,
        format!(
            "training leaves out {} of the answers because of their finish reason: add it to \
             `data.keep_finish_reasons` if they are complete",
            format_share(summary.not_kept, answers)
        ),
    );
    step(
        summary.ok + summary.cached == 0 && summary.quarantined > 0,
        format!(
            "none of the answers can be used for training: `distill cache show --dir {}` shows them",
            failures.with_file_name("cache").display()
        ),
    );
    step(
        summary.without_logprobs * MIN_ANSWERS_PER_PROBLEM > answers,
        format!(
            "{} of the answers have no usable logprobs: `distill probe{config}` shows what the endpoint \
             supports",
            format_share(summary.without_logprobs, answers)
        ),
    );
    for used in &summary.used {
        step(
            used.throttled * MIN_REQUESTS_PER_THROTTLED > used.requests,
            format!(
                "{} throttled {} of the requests: lower `limits.requests_per_minute`, \
                 `limits.tokens_per_minute` or `limits.concurrency`",
                used.teacher,
                format_share(used.throttled, used.requests)
            ),
        );
        let share = used.share().unwrap_or(1.0);
        step(
            share < LOW_LIMIT_USE && summary.seconds > MIN_SECONDS && used.throttled == 0,
            format!(
                "raise `limits.concurrency`: the run used {1:.0} % of the rate limit of {0}",
                used.teacher,
                share * 100.0
            ),
        );
    }
    if steps.is_empty() && summary.error.is_none() && answers + summary.cached > 0 {
        let read_warnings = if summary.warnings.is_empty() {
            ""
        } else {
            "read the warnings, and then "
        };
        let config_change = match summary.before_training {
            Some(TrainingObstacle::OtherCache) => {
                "unset `data.cache`, which is the cache of another run, and then "
            }
            Some(TrainingObstacle::NoStudent) => "set `student.path` to a model folder, and then ",
            None => "",
        };
        // With other answers beside those of a mock, the training uses the other ones.
        let (flag, setting) = if summary.from_mock > 0 && summary.from_mock == answers {
            (
                " --set data.groups=mock",
                ", and with `data.groups` = \"mock\" to use the answers of the mock",
            )
        } else {
            ("", "")
        };
        let train = match config.as_str() {
            "" => format!("`distill train` with the same config{setting}"),
            config => format!("`distill train{config}{flag}`"),
        };
        steps.push(format!("{read_warnings}{config_change}train: {train}"));
    }
    steps
}

/// Returns advice on how to request the failed rows again.
fn retry_advice(summary: &HarvestSummary) -> String {
    let config = after_space(&summary.arguments);
    let again = format!("`distill harvest{config} --again failed`");
    match summary.given_up {
        0 => "rerun the command to retry these rows".into(),
        count if count == summary.failed => {
            format!("these rows used up `retry.max_attempts` paid attempts; {again} retries them")
        }
        count => format!(
            "rerun the command to retry these rows, except for {} that used up `retry.max_attempts` paid \
             attempts; {again} retries those",
            format_count(count)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::timeline::LimitUse;
    use std::collections::BTreeMap;

    fn steps(summary: HarvestSummary) -> String {
        next_steps(&summary, Path::new("run/failures.jsonl")).join("\n")
    }

    #[test]
    fn advice_is_to_train_after_a_good_run_and_to_fix_problems_after_a_bad_one() {
        let good = HarvestSummary {
            ok: 100,
            ..HarvestSummary::default()
        };
        assert_eq!(steps(good), "train: `distill train` with the same config");
        let with_warning = steps(HarvestSummary {
            ok: 100,
            arguments: "-c run.toml".into(),
            warnings: vec!["odd".into()],
            ..HarvestSummary::default()
        });
        assert_eq!(
            with_warning,
            "read the warnings, and then train: `distill train -c run.toml`"
        );
        let rehearsal = steps(HarvestSummary {
            ok: 100,
            from_mock: 100,
            arguments: "-c run.toml".into(),
            ..HarvestSummary::default()
        });
        assert_eq!(
            rehearsal,
            "train: `distill train -c run.toml --set data.groups=mock`"
        );
        let bad = steps(HarvestSummary {
            ok: 90,
            cut_off: 45,
            quarantines: BTreeMap::from([("refusal".into(), 9)]),
            without_logprobs: 90,
            failed: 2,
            pending: 8,
            seconds: 3_600.0,
            used: vec![
                LimitUse {
                    teacher: "slow".into(),
                    requests: 10,
                    requests_allowed: Some(100.0),
                    ..LimitUse::default()
                },
                LimitUse {
                    teacher: "strict".into(),
                    requests: 100,
                    throttled: 30,
                    ..LimitUse::default()
                },
            ],
            ..HarvestSummary::default()
        });
        for part in [
            "8 rows are pending",
            "run/failures.jsonl",
            "which cut off 50.0 %",
            "100.0 % of the answers have no usable logprobs",
            "the run used 10 % of the rate limit of slow",
            "strict throttled 30.0 %",
            "refused 10.0 % of the questions",
            "`distill harvest --again refusal`",
            "`distill probe` shows",
        ] {
            assert!(bad.contains(part), "{part} is not in:\n{bad}");
        }
    }

    #[test]
    fn advice_on_given_up_rows_names_again_failed() {
        let advice = |failed, given_up| {
            steps(HarvestSummary {
                ok: 90,
                failed,
                given_up,
                ..HarvestSummary::default()
            })
        };
        assert!(!advice(2, 0).contains("--again"));
        assert!(advice(2, 1).contains("except for 1 that"));
        assert!(advice(2, 1).contains("`distill harvest --again failed`"));
        assert!(advice(2, 2).contains("these rows used up"));
    }

    #[test]
    fn rerun_is_advised_only_if_nothing_must_change_first() {
        let advises_rerun = |error: Exit| {
            let summary = HarvestSummary {
                ok: 90,
                pending: 10,
                error: Some(error.into()),
                ..HarvestSummary::default()
            };
            steps(summary).contains("rerun the command")
        };
        assert!(advises_rerun(Exit::Signal(2)));
        assert!(advises_rerun(Exit::SomeFailed("2 failed".into())));
        assert!(!advises_rerun(Exit::Resumable("raise `budget.usd`".into())));
        assert!(!advises_rerun(Exit::Usage("change it".into())));
    }
}
