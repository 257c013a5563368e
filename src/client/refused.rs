//! Error messages, with advice, for an endpoint that refuses every request.

use anyhow::anyhow;

use crate::client::attempt_error::RefusalReason;
use crate::config::{self, KeySource};
use crate::exit::Exit;

/// Returns the error, with advice, for an endpoint that refuses every request.
pub(crate) fn refused(
    reason: RefusalReason,
    message: &str,
    teacher: &config::TeacherConfig,
) -> anyhow::Error {
    let rejected_key = |source: String, advice: &str| {
        format!("the endpoint rejects the key {source} ({message}): {advice}")
    };
    let advice = match reason {
        RefusalReason::Key => match teacher.key_source() {
            KeySource::None => format!(
                "the endpoint requires a key ({message}): set `teacher.api_key_env` to the name of the \
                 variable that holds the key"
            ),
            KeySource::Variable(name) => {
                rejected_key(format!("in `{name}`"), "set the variable to a valid key")
            }
            KeySource::File(path) => rejected_key(
                format!("in {}", path.display()),
                "write a valid key into `teacher.api_key_file`",
            ),
            KeySource::Command(_) => rejected_key(
                "that `teacher.api_key_command` prints".into(),
                "run the command by hand and check the key that it prints",
            ),
        },
        RefusalReason::Forbidden => format!(
            "the endpoint forbids the request ({message}): check the permissions of the account, and \
             `teacher.model`"
        ),
        RefusalReason::Credit => format!(
            "the account has no credit left ({message}): no more requests are sent; add credit and rerun the \
             command"
        ),
        RefusalReason::Model => format!(
            "the endpoint has no model `teacher.model` = \"{}\" ({message}): set it to a model of the endpoint",
            teacher.model
        ),
        RefusalReason::Address => format!(
            "the endpoint serves nothing at {} ({message}): check `teacher.base_url`{}",
            completions_url(teacher),
            path_advice(teacher)
        ),
        RefusalReason::Redirect => format!(
            "the endpoint redirects ({message}), and redirects are not followed: set `teacher.base_url` to \
             the final address"
        ),
    };
    anyhow!(advice)
}

/// Returns the URL of chat completions.
pub(crate) fn completions_url(teacher: &config::TeacherConfig) -> String {
    format!(
        "{}/chat/completions",
        crate::config::teacher::identity(teacher)
    )
}

/// Returns advice for a base URL without a path; empty if there is a path.
pub(crate) fn path_advice(teacher: &config::TeacherConfig) -> &'static str {
    let address = crate::config::teacher::identity(teacher);
    let path = address
        .split_once("://")
        .and_then(|(_, host_and_path)| host_and_path.split_once('/'));
    if path.is_none() {
        ", which for most endpoints ends with /v1"
    } else {
        ""
    }
}

/// As [`refused`], for an endpoint that answered earlier in the run. The exit status is that of [`Exit::Resumable`].
pub(crate) fn refused_after_answers(
    reason: RefusalReason,
    message: &str,
    teacher: &config::TeacherConfig,
) -> anyhow::Error {
    let error = refused(reason, message, teacher);
    Exit::Resumable(format!(
        "{error}; the endpoint answered before, so fix this and rerun the command"
    ))
    .into()
}
