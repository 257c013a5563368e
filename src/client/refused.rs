//! TODO

use crate::client::attempt_error::RefusalReason;
use crate::config;
use crate::config::KeySource;
use crate::exit::Exit;
use anyhow::anyhow;

/// The endpoint refuses every request, whatever it asks.
pub(crate) fn refused(
    reason: RefusalReason,
    message: &str,
    teacher: &config::TeacherConfig,
) -> anyhow::Error {
    let refuses = |holder: String, advice: &str| {
        format!("the endpoint refuses the key {holder} ({message}): {advice}")
    };
    let advice = match reason {
        RefusalReason::Key => match teacher.key_source() {
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
        RefusalReason::Forbidden => format!(
            "the endpoint forbids this ({message}): check what the account may use, and \
             `teacher.model`"
        ),
        RefusalReason::Credit => format!(
            "the account has no credit left ({message}): nothing more is asked; run the same \
             command when it has"
        ),
        RefusalReason::Model => format!(
            "the endpoint does not know `teacher.model` = \"{}\" ({message})",
            teacher.model
        ),
        RefusalReason::Address => format!(
            "there is nothing to ask at {} ({message}): check `teacher.base_url`{}",
            completions_url(teacher),
            path_advice(teacher)
        ),
        RefusalReason::Redirect => format!(
            "the endpoint redirects ({message}), which is not followed: set `teacher.base_url` to \
             the final address"
        ),
    };
    anyhow!(advice)
}

/// Where chat completions are asked for.
pub(crate) fn completions_url(teacher: &config::TeacherConfig) -> String {
    format!(
        "{}/chat/completions",
        crate::config::teacher::identity(teacher)
    )
}

/// The most frequent mistake in an address.
pub(crate) fn path_advice(teacher: &config::TeacherConfig) -> &'static str {
    let address = crate::config::teacher::identity(teacher);
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
pub(crate) fn refused_by_now(
    reason: RefusalReason,
    message: &str,
    teacher: &config::TeacherConfig,
) -> anyhow::Error {
    let error = refused(reason, message, teacher);
    Exit::Resumable(format!(
        "{error}; it has answered before, so run the same command once that is mended"
    ))
    .into()
}
