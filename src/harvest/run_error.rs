//! Errors that end a run, with advice for the user. Shared by real-time and batch mode. Pure.

use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;

use crate::config;
use crate::exit::Exit;
use crate::terminal::{format_count, format_duration};

/// Error of an endpoint that fails every request with the same message.
pub(crate) fn repeated_server_error(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint fails every request with the same error ({message}): stopped; \
         if the error names a field, change it in `[sampling]` or `[teacher]` and rerun the command"
    )
}

/// Error of an endpoint that requests a longer wait than a run accepts.
pub(crate) fn long_wait(until: &str, wait: Duration, message: &str) -> anyhow::Error {
    let wait = format_duration(wait);
    Exit::Resumable(format!(
        "the endpoint asks to wait until {until}, which is {wait} ({message}): stopped; rerun the \
         command then"
    ))
    .into()
}

/// Error of a results file from which no row can be parsed.
pub(crate) fn unreadable_results(file: &Path) -> anyhow::Error {
    anyhow!(
        "no line of a batch's results can be parsed: stopped, so that nothing is bought \
         twice; the file is saved as {}; rerun the command to read the batch again",
        file.display()
    )
}

/// Error of a results file that could not be downloaded or decoded `count` times.
pub(crate) fn results_not_read(count: u32, message: &str) -> anyhow::Error {
    let message = format!(
        "a batch's results file could not be read {count} times ({message}): stopped; rerun the command to read it \
         again, nothing is bought twice"
    );
    Exit::Resumable(message).into()
}

/// Error of a batch that was completed with answers but names no results file.
pub(crate) fn no_results(batch: &str) -> anyhow::Error {
    anyhow!(
        "the batch {batch} has ended, but the endpoint names no file with its answers: stopped, \
         so that nothing is bought twice; rerun the command to check the batch again"
    )
}

/// Error of an endpoint that refuses every request with the same message.
pub(crate) fn repeated_refusal(message: &str) -> anyhow::Error {
    anyhow!(
        "the endpoint refuses every request ({message}): stopped; change the field that it \
         names in `[sampling]` or `[teacher]` and rerun the command"
    )
}

/// Error of consecutive answers without usable logprobs.
pub(crate) fn without_logprobs(count: u32, reason: &str, top_logprobs: u32) -> anyhow::Error {
    anyhow!(
        "{count} answers in a row have no usable logprobs ({reason}), although \
         `sampling.top_logprobs` = {top_logprobs} asks for them: stopped; use an endpoint \
         that sends them (check it with `distill probe`), or set `harvest.on_missing_logprobs = \"warn\"` to \
         continue with the answers alone"
    )
}

/// Error of consecutive unusable answers.
pub(crate) fn unusable_answers(count: u32, reason: &str) -> anyhow::Error {
    let advice = match reason {
        "empty: length" => {
            "they were cut off before any text: raise `sampling.max_tokens`, and set \
             `sampling.reasoning = true` for a reasoning model"
        }
        "refusal" => "change the prompts, the template or the model",
        _ => "inspect them with `distill cache show`, and check the endpoint with `distill probe`",
    };
    anyhow!(
        "{count} answers in a row are unusable ({reason}): stopped; {advice}, and ask for \
         them again with `distill harvest --again quarantined`"
    )
}

/// Error of an address from which no reply has arrived in this run.
pub(crate) fn no_reply(teacher: &config::TeacherConfig, message: &str) -> anyhow::Error {
    let base_url = &teacher.base_url;
    match base_url.strip_prefix("https://") {
        // Messages of rustls and of native-tls.
        Some(host_and_path)
            if ["InvalidContentType", "wrong version number"]
                .iter()
                .any(|words| message.contains(words)) =>
        {
            anyhow!(
                "the server at {base_url} does not speak TLS ({message}): check the port, or, if the server is \
             your own, set `teacher.base_url` to \"http://{host_and_path}\""
            )
        }
        _ => anyhow!(
            "nothing answers at {base_url} ({message}): check `teacher.base_url`, and that the endpoint is \
             running"
        ),
    }
}

/// Error of an outage longer than `retry.max_outage_s`.
pub(crate) fn outage(outage: Duration, message: &str) -> anyhow::Error {
    let outage = format_duration(outage);
    let message = format!(
        "no request has succeeded for {outage} ({message}): stopped; rerun the command to resume"
    );
    Exit::Resumable(message).into()
}

/// Error of a disk that stayed full: `recorded` answers are in the cache, `lost` were held in memory.
pub(crate) fn disk_full(
    time: Duration,
    message: &str,
    recorded: usize,
    lost: usize,
) -> anyhow::Error {
    let message = format!(
        "the disk has been full for {} ({message}): stopped; {} are safe in the \
         cache, {} held in memory are lost and may have been billed; free disk space and rerun the \
         command to resume",
        format_duration(time),
        answers(recorded),
        answers(lost)
    );
    Exit::Resumable(message).into()
}

/// Error of shared limits that could not be read for too long.
pub(crate) fn no_shared_limits(outage: Duration, message: &str) -> anyhow::Error {
    let outage = format_duration(outage);
    let message = format!(
        "the shared limits in `limits.shared` could not be read for {outage} ({message}): stopped; \
         start the Redis server and rerun the command to resume"
    );
    Exit::Resumable(message).into()
}

/// Adds the number of recorded answers to the error of a failed write to the cache.
pub(crate) fn not_recorded(error: anyhow::Error, recorded: usize) -> anyhow::Error {
    error.context(format!(
        "an answer could not be recorded: stopped; {} are safe in the cache",
        answers(recorded)
    ))
}

fn answers(count: usize) -> String {
    match count {
        1 => "1 answer".into(),
        _ => format!("{} answers", format_count(count as u64)),
    }
}
