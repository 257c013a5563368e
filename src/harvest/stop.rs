//! Why nothing more is asked, and what the user can do about it: the ends that both ways of asking
//! share, one by one and in batches. Pure.

use std::time::Duration;

use anyhow::anyhow;

use super::budget::Budget;
use super::retry::Reason;
use crate::config;
use crate::exit::Exit;
use crate::terminal::{format_count, format_dollars, format_duration};

/// The endpoint refuses every request, whatever it asks.
pub fn refused(reason: Reason, message: &str, teacher: &config::Teacher) -> anyhow::Error {
    let variable = &teacher.api_key_env;
    let advice = match reason {
        Reason::Key if variable.is_empty() => format!(
            "the endpoint asks for a key ({message}): set `teacher.api_key_env` to the name of the \
             variable that holds it"
        ),
        Reason::Key => format!(
            "the endpoint refuses the key in `{variable}` ({message}): set the variable to a valid \
             key"
        ),
        Reason::Forbidden => format!(
            "the endpoint forbids this ({message}): check what the account may use, and \
             `teacher.model`"
        ),
        Reason::Credit => format!(
            "the account has no credit left ({message}): nothing more is asked; run the same \
             command when it has"
        ),
        Reason::Model => format!(
            "the endpoint does not know `teacher.model` = \"{}\" ({message})",
            teacher.model
        ),
        Reason::Redirect => format!(
            "the endpoint redirects ({message}), which is not followed: set `teacher.base_url` to \
             the final address"
        ),
    };
    anyhow!(advice)
}

/// The endpoint refuses all that it was asked in the same words.
pub fn refused_alike(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint refuses every request ({message}): nothing more is asked; change what it \
         names in `[sampling]` or `[teacher]` and run the same command"
    )
}

/// Nothing has ever answered there.
pub fn nothing_answers(teacher: &config::Teacher, message: &str) -> anyhow::Error {
    anyhow!(
        "nothing answers at {} ({message}): check `teacher.base_url`, and that the endpoint is \
         running",
        teacher.base_url
    )
}

/// Nothing has succeeded for too long.
pub fn outage(silence: Duration, message: &str) -> anyhow::Error {
    let silence = format_duration(silence);
    let message = format!(
        "nothing has succeeded for {silence} ({message}): stopped; run the same command to go on"
    );
    Exit::Resumable(message).into()
}

/// There was no room on the disk for too long.
pub fn disk_full(time: Duration, message: &str, safe: usize, lost: usize) -> anyhow::Error {
    let message = format!(
        "the disk is full, and was for {} ({message}): nothing more is asked; {} are safe in the \
         cache, {} that waited in memory are lost, and may have been billed; make room and run the \
         same command to go on",
        format_duration(time),
        answers(safe),
        answers(lost)
    );
    Exit::Resumable(message).into()
}

/// Nobody has known for too long what other processes have left of the limits.
pub fn no_shared_limits(silence: Duration, message: &str) -> anyhow::Error {
    let silence = format_duration(silence);
    let message = format!(
        "the limits in `limits.shared` could not be asked for in {silence} ({message}): stopped; \
         start the Redis server and run the same command to go on"
    );
    Exit::Resumable(message).into()
}

/// An answer could not be recorded.
pub fn not_recorded(error: anyhow::Error, safe: usize) -> anyhow::Error {
    let safe = answers(safe);
    error.context(format!(
        "an answer could not be recorded, so nothing more is asked; {safe} are safe in the cache"
    ))
}

fn answers(count: usize) -> String {
    match count {
        1 => "1 answer".into(),
        _ => format!("{} answers", format_count(count as u64)),
    }
}

/// The next request may cost more than the rest of the budget.
pub fn out_of_money(budget: &Budget) -> anyhow::Error {
    let message = format!(
        "the budget is used up: {} of {} are spent, and the next request may cost more than the \
         rest; raise `budget.usd` and run the same command to go on",
        format_dollars(budget.spent().total()),
        format_dollars(budget.cap().unwrap_or_default())
    );
    Exit::Resumable(message).into()
}
