//! Why nothing more is asked, and what the user can do about it: the ends that both ways of asking
//! share, one by one and in batches. Pure.

use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;

use crate::budget::account::Account;
use crate::budget::ledger::Store;
use crate::client::http;
use crate::client::outcome::Reason;
use crate::config::{self, KeySource};
use crate::exit::Exit;
use crate::terminal::{format_count, format_duration};

/// The endpoint refuses every request, whatever it asks.
pub fn refused(reason: Reason, message: &str, teacher: &config::Teacher) -> anyhow::Error {
    let refuses = |holder: String, advice: &str| {
        format!("the endpoint refuses the key {holder} ({message}): {advice}")
    };
    let advice = match reason {
        Reason::Key => match teacher.key_source() {
            KeySource::None => format!(
                "the endpoint asks for a key ({message}): set `teacher.api_key_env` to the name of the \
                 variable that holds it"
            ),
            KeySource::Variable(name) => {
                refuses(format!("in `{name}`"), "set the variable to a valid key")
            }
            KeySource::File(path) => refuses(
                format!("in {}", path.display()),
                "write a valid key into `teacher.api_key_file`",
            ),
            KeySource::Command(_) => refuses(
                "that `teacher.api_key_command` prints".into(),
                "run the command by hand, and see what it prints and for whom",
            ),
        },
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
        Reason::Address => format!(
            "there is nothing to ask at {} ({message}): check `teacher.base_url`{}",
            completions_url(teacher),
            path_advice(teacher)
        ),
        Reason::Redirect => format!(
            "the endpoint redirects ({message}), which is not followed: set `teacher.base_url` to \
             the final address"
        ),
    };
    anyhow!(advice)
}

/// Where chat completions are asked for.
fn completions_url(teacher: &config::Teacher) -> String {
    format!("{}/chat/completions", http::identity(teacher))
}

/// The most frequent mistake in an address.
fn path_advice(teacher: &config::Teacher) -> &'static str {
    let address = http::identity(teacher);
    let path = address
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'));
    if path.is_none() {
        ", which for most endpoints ends with /v1"
    } else {
        ""
    }
}

/// An endpoint that has answered says by now, again and again, that no request can succeed.
pub fn refused_by_now(reason: Reason, message: &str, teacher: &config::Teacher) -> anyhow::Error {
    let error = refused(reason, message, teacher);
    Exit::Resumable(format!(
        "{error}; it has answered before, so run the same command once that is mended"
    ))
    .into()
}

/// The server fails at all that it was asked, in the same words.
pub fn failed_alike(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint answers every request with the same error ({message}): nothing more is asked; \
         if it names a field, change that in `[sampling]` or `[teacher]`, and run the same command"
    )
}

/// The endpoint is there again only in hours.
pub fn far(until: &str, wait: Duration, message: &str) -> anyhow::Error {
    let wait = format_duration(wait);
    Exit::Resumable(format!(
        "the endpoint asks to wait until {until}, which is {wait} ({message}): stopped; run the same \
         command then"
    ))
    .into()
}

/// A results file of a batch that no line can be read of.
pub fn unreadable_results(file: &Path) -> anyhow::Error {
    anyhow!(
        "no line of a batch's results can be read: nothing more is asked, so that nothing is bought \
         twice; the file is kept as {}, and the same command reads the batch again",
        file.display()
    )
}

/// A results file could not be downloaded or decoded, again and again.
pub fn results_not_read(count: u32, message: &str) -> anyhow::Error {
    let message = format!(
        "a batch's results file could not be read {count} times ({message}): stopped; run the same command to read it \
         again, nothing is bought twice"
    );
    Exit::Resumable(message).into()
}

/// A batch has ended with answers, and the endpoint names no file that holds them.
pub fn no_results(batch: &str) -> anyhow::Error {
    anyhow!(
        "the batch {batch} has ended, and the endpoint names no file with its answers: nothing more is \
         asked, so that nothing is bought twice; the same command looks at the batch again"
    )
}

/// The endpoint refuses all that it was asked in the same words.
pub fn refused_alike(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint refuses every request ({message}): nothing more is asked; change what it \
         names in `[sampling]` or `[teacher]` and run the same command"
    )
}

/// Answers come, and training can use none of their logprobs.
pub fn without_logprobs(count: u32, why: &str, top_logprobs: u32) -> anyhow::Error {
    anyhow!(
        "{count} answers in a row came without logprobs that training can use ({why}), though \
         `sampling.top_logprobs` = {top_logprobs} asks for them: nothing more is asked; ask an endpoint \
         that sends them (`distill probe` tells), or set `harvest.on_missing_logprobs = \"warn\"` to go on \
         with the answers alone"
    )
}

/// Answers come, and none is of any use.
pub fn worthless(count: u32, reason: &str) -> anyhow::Error {
    let advice = match reason {
        "empty: length" => {
            "they were cut off before they began: raise `sampling.max_tokens`, and set \
             `sampling.reasoning = true` for a model that thinks first"
        }
        "refusal" => "change the prompts, the template or the model",
        _ => "look at them with `distill cache show`, and at the endpoint with `distill probe`",
    };
    anyhow!(
        "{count} answers in a row are of no use ({reason}): nothing more is asked; {advice}, and have \
         them asked anew with `distill harvest --again quarantined`"
    )
}

/// Nothing has ever answered there.
pub fn nothing_answers(teacher: &config::Teacher, message: &str) -> anyhow::Error {
    let base_url = &teacher.base_url;
    match base_url.strip_prefix("https://") {
        // In the words of rustls and of native-tls.
        Some(rest)
            if ["InvalidContentType", "wrong version number"]
                .iter()
                .any(|words| message.contains(words)) =>
        {
            anyhow!(
                "the server at {base_url} does not speak TLS ({message}): check the port, or, if the server is \
             your own, set `teacher.base_url` to \"http://{rest}\""
            )
        }
        _ => anyhow!(
            "nothing answers at {base_url} ({message}): check `teacher.base_url`, and that the endpoint is \
             running"
        ),
    }
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
pub fn out_of_money<S: Store>(account: &Account<S>) -> anyhow::Error {
    let message = format!(
        "the budget is used up: {} of {} are spent, and the next request may cost more than the \
         rest; raise `budget.usd` and run the same command to go on",
        account.spent().total(),
        account.cap().unwrap_or_default()
    );
    Exit::Resumable(message).into()
}
