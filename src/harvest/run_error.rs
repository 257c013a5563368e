//! Why nothing more is asked, and what the user can do about it: the ends that both ways of asking
//! share, one by one and in batches. Pure.

use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;

use crate::config;
use crate::exit::Exit;
use crate::terminal::{format_count, format_duration};

/// The server fails at all that it was asked, in the same words.
pub(crate) fn failed_alike(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint answers every request with the same error ({message}): nothing more is asked; \
         if it names a field, change that in `[sampling]` or `[teacher]`, and run the same command"
    )
}

/// The endpoint is there again only in hours.
pub(crate) fn long_wait(until: &str, wait: Duration, message: &str) -> anyhow::Error {
    let wait = format_duration(wait);
    Exit::Resumable(format!(
        "the endpoint asks to wait until {until}, which is {wait} ({message}): stopped; run the same \
         command then"
    ))
    .into()
}

/// A results file of a batch that no line can be read of.
pub(crate) fn unreadable_results(file: &Path) -> anyhow::Error {
    anyhow!(
        "no line of a batch's results can be read: nothing more is asked, so that nothing is bought \
         twice; the file is kept as {}, and the same command reads the batch again",
        file.display()
    )
}

/// A results file could not be downloaded or decoded, again and again.
pub(crate) fn results_not_read(count: u32, message: &str) -> anyhow::Error {
    let message = format!(
        "a batch's results file could not be read {count} times ({message}): stopped; run the same command to read it \
         again, nothing is bought twice"
    );
    Exit::Resumable(message).into()
}

/// A batch has ended with answers, and the endpoint names no file that holds them.
pub(crate) fn no_results(batch: &str) -> anyhow::Error {
    anyhow!(
        "the batch {batch} has ended, and the endpoint names no file with its answers: nothing more is \
         asked, so that nothing is bought twice; the same command looks at the batch again"
    )
}

/// The endpoint refuses all that it was asked in the same words.
pub(crate) fn refused_alike(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint refuses every request ({message}): nothing more is asked; change what it \
         names in `[sampling]` or `[teacher]` and run the same command"
    )
}

/// Answers come, and training can use none of their logprobs.
pub(crate) fn without_logprobs(count: u32, why: &str, top_logprobs: u32) -> anyhow::Error {
    anyhow!(
        "{count} answers in a row came without logprobs that training can use ({why}), though \
         `sampling.top_logprobs` = {top_logprobs} asks for them: nothing more is asked; ask an endpoint \
         that sends them (`distill probe` tells), or set `harvest.on_missing_logprobs = \"warn\"` to go on \
         with the answers alone"
    )
}

/// Answers come, and none is of any use.
pub(crate) fn worthless(count: u32, reason: &str) -> anyhow::Error {
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
pub(crate) fn nothing_answers(teacher: &config::TeacherConfig, message: &str) -> anyhow::Error {
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
pub(crate) fn outage(silence: Duration, message: &str) -> anyhow::Error {
    let silence = format_duration(silence);
    let message = format!(
        "nothing has succeeded for {silence} ({message}): stopped; run the same command to go on"
    );
    Exit::Resumable(message).into()
}

/// There was no room on the disk for too long.
pub(crate) fn disk_full(time: Duration, message: &str, safe: usize, lost: usize) -> anyhow::Error {
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
pub(crate) fn no_shared_limits(silence: Duration, message: &str) -> anyhow::Error {
    let silence = format_duration(silence);
    let message = format!(
        "the limits in `limits.shared` could not be asked for in {silence} ({message}): stopped; \
         start the Redis server and run the same command to go on"
    );
    Exit::Resumable(message).into()
}

/// An answer could not be recorded.
pub(crate) fn not_recorded(error: anyhow::Error, safe: usize) -> anyhow::Error {
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
