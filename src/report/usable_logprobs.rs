//! Checks during the harvest whether the logprobs of an answer can become soft labels. Pure.

use crate::cache::record::Logprobs;
use crate::data::align::candidates::{EXCESS, is_usable};
use crate::data::align::token_ids;

/// Returns the reason why training cannot use these logprobs of `text`, or `None` if it can.
pub(crate) fn problem(logprobs: &Logprobs, text: &str) -> Option<&'static str> {
    // The text of tokens that are given by id is unknown without the tokenizer.
    if !logprobs.matches_text
        && !token_ids::are_ids(&logprobs.token)
        && !crate::data::align::teacher::spells(&logprobs.into(), text.as_bytes())
    {
        return Some("its tokens do not spell the answer");
    }
    let any_usable = |values: &[Option<f32>]| values.iter().flatten().any(is_usable);
    let has_numbers =
        any_usable(&logprobs.logprob) || logprobs.top_logprob.iter().any(|top| any_usable(top));
    if !has_numbers {
        return Some("none of them is a number");
    }
    // Training skips a position whose probabilities sum to more than 1, so one valid position is enough.
    let mut positions = logprobs.top.iter().zip(&logprobs.top_logprob);
    if positions.all(|(top, values)| mass(top, values) > 1.0 + EXCESS) {
        return Some("the probabilities sum to more than 1");
    }
    None
}

/// Returns the sum of the probabilities at a position. If it exceeds 1, a token that is listed twice counts once.
fn mass(top: &[String], values: &[Option<f32>]) -> f64 {
    let sum_where = |is_counted: &dyn Fn(usize) -> bool| -> f64 {
        let usable = values.iter().enumerate();
        let usable = usable
            .filter(|&(rank, value)| value.as_ref().is_some_and(is_usable) && is_counted(rank));
        usable
            .map(|(_, value)| f64::from(value.unwrap_or(f32::MIN).exp()))
            .sum()
    };
    let total = sum_where(&|_| true);
    if total <= 1.0 + EXCESS {
        return total;
    }
    // Tokens that are not valid UTF-8 all have the text "", so they are not compared.
    sum_where(&|rank| top[rank].is_empty() || !top[..rank].contains(&top[rank]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logprobs(tokens: &[&str], top: &[f32]) -> Logprobs {
        Logprobs {
            token: tokens.iter().map(|token| (*token).into()).collect(),
            logprob: vec![top.first().copied(); tokens.len()],
            top: vec![(0..top.len()).map(|rank| format!("x{rank}")).collect(); tokens.len()],
            top_logprob: vec![top.iter().copied().map(Some).collect(); tokens.len()],
            raw: Vec::new(),
            matches_text: tokens.concat() == "a b",
        }
    }

    #[test]
    fn unusable_logprobs_are_reported_with_a_reason() {
        let problem_of = |tokens: &[&str], top: &[f32]| problem(&logprobs(tokens, top), "a b");
        assert_eq!(problem_of(&["a", " b"], &[-0.5, -1.5]), None);
        assert_eq!(problem_of(&["a", " b", "<|im_end|>"], &[-0.5]), None);
        // Training aligns these: preceding thinking, white space, a stop string, raw vocabulary entries.
        for tokens in [
            &["<think>", "x", "</think>", "a", " b"][..],
            &["\n", "a", " b", "\n"],
            &["a", " b", "STOP", "</s>"],
            &["a", "Ġb"],
            &["token_id:7", "token_id:12"],
        ] {
            assert_eq!(problem_of(tokens, &[-0.5]), None, "{tokens:?}");
        }
        let long = "more".repeat(100);
        assert!(
            problem_of(&["a", " b", &long], &[-0.5])
                .unwrap()
                .contains("spell")
        );
        assert!(problem_of(&["a", " c"], &[-0.5]).unwrap().contains("spell"));
        assert!(problem_of(&["a"], &[-0.5]).unwrap().contains("spell"));
        assert!(
            problem_of(&["a", " b"], &[-9999.0])
                .unwrap()
                .contains("a number")
        );
        assert!(problem_of(&["a", " b"], &[]).unwrap().contains("a number"));
        let mut one = logprobs(&["a", " b"], &[-0.1, -0.2]);
        one.top_logprob[1] = vec![Some(-0.7); 2];
        assert_eq!(problem(&one, "a b"), None, "one position of two");
        assert!(
            problem_of(&["a", " b"], &[-0.1, -0.2])
                .unwrap()
                .contains("more than 1")
        );
        assert_eq!(problem_of(&["a", " b"], &[-0.7, -0.7]), None);
        // Some servers list the emitted token twice.
        let mut twice = logprobs(&["a", " b"], &[-0.1, -0.1]);
        twice.top = vec![vec!["x".into(); 2]; 2];
        assert_eq!(problem(&twice, "a b"), None);
    }
}
