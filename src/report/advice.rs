//! What to do after a run, from its summary. Pure.

use std::path::Path;

use crate::exit::Exit;
use crate::report::summary::HarvestSummary;
use crate::terminal::{format_count, format_share};

/// Exit code of [`Exit::SomeFailed`].
const SOME_FAILED: u8 = 3;

/// One sentence a step, the most pressing first.
pub(crate) fn next_steps(summary: &HarvestSummary, failures: &Path) -> Vec<String> {
    let mut steps = Vec::new();
    let config = &summary.arguments;
    let asked = summary.ok + summary.quarantined;
    let mut step = |holds: bool, text: String| {
        if holds {
            steps.push(text);
        }
    };
    // Every other error says itself what to do before the next run.
    let goes_on = summary.error.as_ref().is_none_or(|error| {
        Exit::signal_of(error).is_some() || Exit::code_of(error) == SOME_FAILED
    });
    step(
        summary.pending > 0 && goes_on,
        format!(
            "run the same command again: {} rows are pending, and nothing is asked twice",
            format_count(summary.pending)
        ),
    );
    step(
        summary.failed > 0,
        format!("look into {}: {}", failures.display(), again(summary)),
    );
    let refusals = summary.quarantines.get("refusal").copied().unwrap_or(0);
    step(
        refusals * 20 > asked,
        format!(
            "the teacher refused {} of the questions, and none of these is trained on: `distill harvest {config} \
             --again refusal` asks them once more",
            format_share(refusals, asked)
        ),
    );
    step(
        summary.cut_off * 20 > asked,
        format!(
            "raise `sampling.max_tokens`: it cut off {} of the answers (this asks for those alone)",
            format_share(summary.cut_off, asked)
        ),
    );
    step(
        summary.without_logprobs * 20 > asked,
        format!(
            "{} of the answers came without usable logprobs: `distill probe {config}` tells what the \
             endpoint offers",
            format_share(summary.without_logprobs, asked)
        ),
    );
    for used in &summary.used {
        step(
            used.throttled * 100 > used.requests,
            format!(
                "{} refused {} of the requests for their rate: lower `limits.requests_per_minute`, \
                 `limits.tokens_per_minute` or `limits.concurrency`",
                used.teacher,
                format_share(used.throttled, used.requests)
            ),
        );
        let share = used.share().unwrap_or(1.0);
        step(
            share < 0.5 && summary.seconds > 600.0 && used.throttled == 0,
            format!(
                "raise `limits.concurrency`: {} was used to {:.0} % of its rate limit",
                used.teacher,
                share * 100.0
            ),
        );
    }
    if steps.is_empty() && summary.error.is_none() && asked + summary.cached > 0 {
        let first = if summary.warnings.is_empty() {
            ""
        } else {
            "look at the warnings, and then "
        };
        let before = summary.before_training;
        steps.push(match config.as_str() {
            "" => format!("{first}{before}train: `distill train` with the same config"),
            config => format!("{first}{before}train: `distill train {config}`"),
        });
    }
    steps
}

/// How the failed rows are asked again.
fn again(summary: &HarvestSummary) -> String {
    let config = &summary.arguments;
    let asks = format!("`distill harvest {config} --again failed` asks");
    match summary.given_up {
        0 => "the same command asks these rows again".into(),
        count if count == summary.failed => {
            format!("they have been bought `retry.max_attempts` times, and {asks} them again")
        }
        count => format!(
            "the same command asks these rows again, but for {} that have been bought \
             `retry.max_attempts` times, which {asks}",
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
    fn a_good_run_leads_to_training_and_others_to_what_is_wrong() {
        let good = HarvestSummary {
            ok: 100,
            ..HarvestSummary::default()
        };
        assert_eq!(steps(good), "train: `distill train` with the same config");
        let odd = steps(HarvestSummary {
            ok: 100,
            arguments: "-c run.toml".into(),
            warnings: vec!["odd".into()],
            ..HarvestSummary::default()
        });
        assert_eq!(
            odd,
            "look at the warnings, and then train: `distill train -c run.toml`"
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
            "it cut off 50.0 %",
            "100.0 % of the answers came without",
            "slow was used to 10 %",
            "strict refused 30.0 %",
            "refused 10.0 % of the questions",
        ] {
            assert!(bad.contains(part), "{part} is not in:\n{bad}");
        }
    }

    #[test]
    fn rows_bought_max_attempts_times_are_advised_again_failed() {
        let of = |failed, given_up| {
            steps(HarvestSummary {
                ok: 90,
                failed,
                given_up,
                ..HarvestSummary::default()
            })
        };
        assert!(!of(2, 0).contains("--again"));
        assert!(of(2, 1).contains("but for 1 that"));
        assert!(of(2, 2).contains("they have been bought"));
    }

    #[test]
    fn the_same_command_is_advised_only_where_nothing_must_change_first() {
        let after = |error: Exit| {
            let summary = HarvestSummary {
                ok: 90,
                pending: 10,
                error: Some(error.into()),
                ..HarvestSummary::default()
            };
            steps(summary).contains("run the same command again")
        };
        assert!(after(Exit::Signal(2)));
        assert!(after(Exit::SomeFailed("2 failed".into())));
        assert!(!after(Exit::Resumable("raise `budget.usd`".into())));
        assert!(!after(Exit::Usage("change it".into())));
    }
}
