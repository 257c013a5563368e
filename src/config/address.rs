//! Checks of the endpoint's address and headers. Values with environment variables are checked after their expansion.

use std::net::IpAddr;

use http::{HeaderName, HeaderValue};
use url::Url;

use super::error::Mistake;
use super::teacher::{AllowHttp, KeySource, TeacherConfig, VARIABLE_START};

/// Headers that the HTTP client sets itself.
const CONNECTION_HEADERS: [&str; 10] = [
    "Host",
    "Connection",
    "Content-Length",
    "Content-Type",
    "Content-Encoding",
    "Accept-Encoding",
    "Transfer-Encoding",
    "TE",
    "Upgrade",
    "Expect",
];

/// Checks the address and the headers, except for values that contain environment variables.
pub(crate) fn check(settings: &TeacherConfig) -> Result<(), Mistake> {
    if !settings.base_url.contains(VARIABLE_START) {
        parse(settings, &settings.base_url)?;
    }
    check_headers(settings)
}

/// Parses `text`, the base URL with its environment variables expanded.
///
/// # Errors
/// If `text` is not a URL, its scheme is not allowed, it contains a user name, a password, a query or a fragment, or it
/// ends with the path of an API method. The message says what to set instead.
pub(crate) fn parse(settings: &TeacherConfig, text: &str) -> Result<Url, Mistake> {
    let shown = &without_secrets(&settings.base_url);
    let text = without_slash(text);
    if text.is_empty() {
        return Err(mistake(
            "`teacher.base_url` is empty: set it to the address of the endpoint, such as \"https://api.openai.com/v1\""
                .into(),
        ));
    }
    if !text.contains("://") {
        return Err(mistake(format!(
            "`teacher.base_url` = \"{shown}\" has no scheme: write \"https://{shown}\", or \
             \"http://{shown}\" for a server on this machine"
        )));
    }
    let url = Url::parse(text)
        .map_err(|error| mistake(format!("`teacher.base_url` is not a valid URL: {error}")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(mistake(
            "`teacher.base_url` must not contain a user name or password: set \
             `teacher.api_key_env` to the name of the variable that holds the key"
                .into(),
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(mistake(format!(
            "`teacher.base_url` must not contain a query or a fragment: set it to \"{shown}\", and move \
             any parameters after a ? to `teacher.query = {{ api-version = \"...\" }}`"
        )));
    }
    for path in [
        "/chat/completions",
        "/completions",
        "/responses",
        "/messages",
    ] {
        if url.path().trim_end_matches('/').ends_with(path) {
            // The path may come from an environment variable, whose value is not shown.
            let advice = match without_slash(shown).strip_suffix(path) {
                Some(address) => format!("set it to \"{address}\""),
                None => "remove it from the environment variable".to_owned(),
            };
            return Err(mistake(format!(
                "`teacher.base_url` must not end with \"{path}\", because each request appends the path of its API \
                 method: {advice}"
            )));
        }
    }
    check_scheme(settings, &url)?;
    Ok(url)
}

/// Returns the URL without surrounding white space and trailing slashes.
pub(crate) fn without_slash(url: &str) -> &str {
    url.trim().trim_end_matches('/')
}

/// Returns the part of an address that a message may repeat: no user name, password, query or fragment.
fn without_secrets(url: &str) -> String {
    let (url, _) = url.split_once(['?', '#']).unwrap_or((url, ""));
    let (scheme, after_scheme) = url.split_once("://").unwrap_or(("", url));
    // A password in an invalid address may contain a slash.
    let authority_end = match Url::parse(url) {
        Ok(_) => after_scheme.find('/'),
        Err(_) => None,
    };
    let authority = &after_scheme[..authority_end.unwrap_or(after_scheme.len())];
    let user_end = authority.rfind('@').map_or(0, |at| at + 1);
    let host = &after_scheme[user_end..];
    if scheme.is_empty() {
        host.to_owned()
    } else {
        format!("{scheme}://{host}")
    }
}

fn mistake(message: String) -> Mistake {
    Mistake::new("teacher.base_url", message)
}

/// Checks that the scheme is https, or http to this machine, or http that `teacher.allow_http` permits.
fn check_scheme(settings: &TeacherConfig, url: &Url) -> Result<(), Mistake> {
    let shown = &without_secrets(&settings.base_url);
    let mut texts = settings.headers.values().chain(settings.query.values());
    // Environment variables may contain a key, too.
    let may_send_key = settings.key_source() != KeySource::None
        || texts.any(|text| text.contains(VARIABLE_START))
        || settings.base_url.contains(VARIABLE_START);
    let message = match (url.scheme(), settings.allow_http) {
        ("https", _) => return Ok(()),
        ("http", _) if is_loopback(url) => return Ok(()),
        ("http", AllowHttp::WithKey) => return Ok(()),
        ("http", AllowHttp::WithoutKey) if !may_send_key => return Ok(()),
        ("http", AllowHttp::WithoutKey) => format!(
            "`teacher.base_url` = \"{shown}\" would send the key unencrypted: use https; or, where the \
             endpoint needs no key, set `teacher.api_key_env = \"\"`; or allow it with \
             `teacher.allow_http = \"with_key\"`"
        ),
        ("http", AllowHttp::No) if may_send_key => format!(
            "`teacher.base_url` = \"{shown}\" would send the key and the prompts unencrypted: use https; or \
             set `teacher.api_key_env = \"\"` and `teacher.allow_http = true` for an endpoint without a key on \
             your own network, or `teacher.allow_http = \"with_key\"` to send the key as well"
        ),
        ("http", AllowHttp::No) => format!(
            "`teacher.base_url` = \"{shown}\" would send the prompts unencrypted: use https, or \
             set `teacher.allow_http = true` for an endpoint on your own network"
        ),
        _ => format!(
            "`teacher.base_url` = \"{shown}\" must begin with https://, or with http:// for a server on this machine"
        ),
    };
    Err(mistake(message))
}

/// Returns true if the host of the URL is a loopback address.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Checks the names of all headers, and the values without environment variables.
fn check_headers(settings: &TeacherConfig) -> Result<(), Mistake> {
    let key_header = header_name("teacher.api_key_header", &settings.api_key_header)
        .map_err(|message| Mistake::new("teacher.api_key_header", message))?;
    for (setting, name, value) in settings.extra_headers() {
        let config_key = match setting.as_str() {
            "teacher.organization" => "teacher.organization",
            "teacher.project" => "teacher.project",
            _ => "teacher.headers",
        };
        let refuse = |message: String| Err(Mistake::new(config_key, message));
        let is_named = |other: &str| name.eq_ignore_ascii_case(other);
        if CONNECTION_HEADERS.iter().any(|header| is_named(header)) {
            return refuse(format!(
                "`{setting}` cannot be set: the HTTP client controls this header"
            ));
        }
        if is_named(key_header.as_str()) && settings.key_source() != KeySource::None {
            return refuse(format!(
                "`{setting}` is already the header of the key: remove it, or set `teacher.api_key_env = \"\"`"
            ));
        }
        if let Err(message) = header_name(&setting, name) {
            return refuse(message);
        }
        if !value.contains(VARIABLE_START)
            && let Err(message) = header_value(&format!("`{setting}`"), value)
        {
            return refuse(message);
        }
    }
    Ok(())
}

/// Parses the name of a header, which comes from `setting`.
///
/// # Errors
/// A message that names the setting.
pub(crate) fn header_name(setting: &str, name: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(name)
        .map_err(|_| format!("`{setting}`: {name:?} is not a valid header name"))
}

/// Parses the value of a header; `source` is its setting, or "the key".
///
/// # Errors
/// A message that names the source and does not repeat the value, which may be a key.
pub(crate) fn header_value(source: &str, value: &str) -> Result<HeaderValue, String> {
    HeaderValue::try_from(value).map_err(|_| {
        format!(
            "{source} contains characters that are not allowed in a header: set it without line breaks"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_an_api_method_is_refused_in_the_setting_and_in_a_variable() {
        for (base_url, expanded, advice) in [
            (
                "https://a.example/v1/chat/completions/",
                "https://a.example/v1/chat/completions/",
                "set it to \"https://a.example/v1\"",
            ),
            (
                "https://a.example/@team/v1/completions",
                "https://a.example/@team/v1/completions",
                "set it to \"https://a.example/@team/v1\"",
            ),
            (
                "${URL}",
                "https://secret.example/v1/completions",
                "remove it from the environment variable",
            ),
        ] {
            let settings = TeacherConfig {
                base_url: base_url.into(),
                ..TeacherConfig::default()
            };
            let message = parse(&settings, expanded).unwrap_err().message;
            assert!(message.contains("must not end with"), "{message}");
            assert!(message.contains(advice), "{message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
