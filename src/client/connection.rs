//! The connection to an endpoint: its address, and how its machine is known.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::{Certificate, Identity, Url};

use crate::client::credentials::expand;
use crate::config;
use crate::config::{AllowHttp, KeySource};
use crate::exit::Exit;

/// Validated address of an endpoint.
#[derive(Debug)]
pub(crate) struct EndpointAddress {
    /// Without a slash at the end, its variables filled in.
    pub text: String,
    pub query: Vec<(String, String)>,
    url: Url,
}

impl EndpointAddress {
    /// Checks `base_url`: https, or http where that is allowed; no credentials, path of completions or query.
    ///
    /// # Errors
    /// [`Exit::Usage`] with what to write instead.
    pub(crate) fn from_config(settings: &config::TeacherConfig) -> Result<EndpointAddress> {
        let shown = &settings.base_url;
        let text = expand("teacher.base_url", shown)?.text;
        let text = text.trim().trim_end_matches('/').to_owned();
        let usage = |message: String| anyhow::Error::from(Exit::Usage(message));
        if !text.contains("://") {
            return Err(usage(format!(
                "`teacher.base_url` = \"{shown}\" has no scheme: write \"https://{shown}\", or \
                 \"http://{shown}\" for a server on this machine"
            )));
        }
        let url = Url::parse(&text)
            .map_err(|error| usage(format!("`teacher.base_url` is no URL: {error}")))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(usage(
                "`teacher.base_url` must hold no user name and no password: set \
                 `teacher.api_key_env` to the name of the variable that holds the key"
                    .into(),
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            let (address, _) = shown.split_once(['?', '#']).unwrap_or((shown, ""));
            return Err(usage(format!(
                "`teacher.base_url` must end before the query: set it to \"{address}\", and write what \
                 follows the ? as `teacher.query = {{ api-version = \"...\" }}`"
            )));
        }
        for path in [
            "/chat/completions",
            "/completions",
            "/responses",
            "/messages",
        ] {
            if let Some(address) = shown.trim().trim_end_matches('/').strip_suffix(path) {
                return Err(usage(format!(
                    "`teacher.base_url` must end before \"{path}\", which is added to it: set it to \
                     \"{address}\""
                )));
            }
        }
        check_scheme(settings, &url)?;
        let pair = |(name, value): (&String, &String)| {
            let place = format!("teacher.query.{name}");
            Ok((name.clone(), expand(&place, value)?.text))
        };
        Ok(EndpointAddress {
            text,
            query: settings.query.iter().map(pair).collect::<Result<_>>()?,
            url,
        })
    }
}

fn check_scheme(settings: &config::TeacherConfig, url: &Url) -> Result<()> {
    let shown = &settings.base_url;
    let mut texts = settings.headers.values().chain(settings.query.values());
    let has_key = settings.key_source() != KeySource::None
        || texts.any(|text| text.contains("${"))
        || shown.contains("${");
    let message = match (url.scheme(), settings.allow_http) {
        ("https", _) => return Ok(()),
        ("http", _) if is_loopback(url) => return Ok(()),
        ("http", AllowHttp::WithKey) => return Ok(()),
        ("http", AllowHttp::WithoutKey) if !has_key => return Ok(()),
        ("http", AllowHttp::WithoutKey) => format!(
            "`teacher.base_url` = \"{shown}\" would send the key unencrypted: use https; or, where the \
             endpoint needs no key, set `teacher.api_key_env = \"\"`; or insist upon it with \
             `teacher.allow_http = \"with_key\"`"
        ),
        ("http", AllowHttp::No) if has_key => format!(
            "`teacher.base_url` = \"{shown}\" would send the key and the prompts unencrypted: use https; or \
             set `teacher.api_key_env = \"\"` and `teacher.allow_http = true` for an endpoint without a key in \
             a network of your own, or `teacher.allow_http = \"with_key\"` to insist"
        ),
        ("http", AllowHttp::No) => format!(
            "`teacher.base_url` = \"{shown}\" would send the prompts unencrypted: use https, or \
             set `teacher.allow_http = true` for an endpoint in a network of your own"
        ),
        _ => format!("`teacher.base_url` = \"{shown}\" must begin with https://"),
    };
    Err(Exit::Usage(message).into())
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Prepares the connection pool.
///
/// # Errors
/// [`Exit::Usage`] where a certificate cannot be read.
pub(crate) fn client(
    settings: &config::TeacherConfig,
    address: &EndpointAddress,
) -> Result<reqwest::Client> {
    // An error means that a provider is installed already, which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("distill/", env!("CARGO_PKG_VERSION")))
        // A redirect could carry the key and the prompts to another host.
        .redirect(reqwest::redirect::Policy::none())
        // Retries are the dispatcher's, under the rate limit.
        .retry(reqwest::retry::never())
        // An answer is paid for, whatever headers a gateway puts before it, up to hyper's 100 (more room
        // costs every reply 2 % of its CPU time).
        .http1_ignore_invalid_headers_in_responses(true)
        .connect_timeout(seconds("connect_timeout_s", settings.connect_timeout_s)?)
        .timeout(seconds("timeout_s", settings.timeout_s)?);
    if is_loopback(&address.url) {
        builder = builder.no_proxy();
    }
    if let Some(path) = &settings.client_certificate {
        let identity = Identity::from_pem(&read(path)?);
        builder = builder.identity(identity.map_err(|error| {
            Exit::Usage(format!(
                "`teacher.client_certificate` {} holds no certificate with its key in PEM: {error}",
                path.display()
            ))
        })?);
    }
    if let Some(path) = &settings.ca_file {
        let no_certificate = |why: &str| {
            Exit::Usage(format!(
                "`teacher.ca_file` {} holds no certificate in PEM{why}",
                path.display()
            ))
        };
        let certificates = Certificate::from_pem_bundle(&read(path)?)
            .map_err(|error| no_certificate(&format!(": {error}")))?;
        if certificates.is_empty() {
            return Err(no_certificate("").into());
        }
        builder = builder.tls_certs_merge(certificates);
    } else if address.url.scheme() == "http" {
        // No certificate is ever checked, so a machine that has none installed can go on.
        builder = builder.tls_certs_only([]);
    }
    builder.build().context(
        "cannot set up the HTTP client (the proxy of HTTPS_PROXY or ALL_PROXY, and the certificates of \
         SSL_CERT_FILE, are read for it)",
    )
}

fn read(path: &Path) -> Result<Vec<u8>> {
    crate::fs::read(path).map_err(|error| Exit::Usage(format!("{error:#}")).into())
}

/// A setting that is a time to wait.
///
/// # Errors
/// [`Exit::Usage`] where it is none.
pub(crate) fn seconds(name: &str, value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| Exit::Usage(format!("`teacher.{name}` = {value} is no time to wait")).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::http::HttpTeacher;

    fn settings(url: &str) -> config::TeacherConfig {
        config::TeacherConfig {
            base_url: url.into(),
            api_key_env: String::new(),
            ..config::TeacherConfig::default()
        }
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_encryption() {
        for url in [
            "https://api.example.com/v1",
            "http://localhost:8000/v1",
            "http://127.0.0.2/v1",
            "http://[::1]:80/v1/",
        ] {
            assert!(HttpTeacher::new(&settings(url)).is_ok(), "{url}");
        }
        let cases = [
            ("http://api.example.com/v1", "use https"),
            ("http://localhost.example.com/v1", "use https"),
            ("http://192.168.0.1/v1", "use https"),
            ("ftp://example.com", "must begin with https"),
            ("example.com/v1", "write \"https://example.com/v1\""),
            (
                "localhost:8080/v1",
                "\"http://localhost:8080/v1\" for a server",
            ),
            ("https://user:pw@example.com", "no user name"),
            (
                "https://example.com/v1/chat/completions/",
                "set it to \"https://example.com/v1\"",
            ),
            ("https://example.com/v1?api-version=2", "teacher.query"),
        ];
        for (url, expected) in cases {
            let error = HttpTeacher::new(&settings(url)).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(Exit::code_of(&error), 2);
        }
    }

    #[test]
    fn another_machine_is_spoken_to_in_the_clear_only_where_that_is_asked_for() {
        let at = |allow_http: AllowHttp, command: Option<&str>| {
            let settings = config::TeacherConfig {
                allow_http,
                api_key_command: command.map(str::to_owned),
                ..settings("http://vllm:8000/v1")
            };
            HttpTeacher::new(&settings)
                .err()
                .map(|error| error.to_string())
        };
        let key = Some("echo a-key");
        assert!(
            at(AllowHttp::No, None)
                .unwrap()
                .contains("allow_http = true")
        );
        assert_eq!(at(AllowHttp::WithoutKey, None), None);
        assert!(at(AllowHttp::WithoutKey, key).unwrap().contains("with_key"));
        assert_eq!(at(AllowHttp::WithKey, key), None);
    }

    #[test]
    fn a_missing_key_is_named_by_its_variable() {
        let settings = config::TeacherConfig {
            api_key_env: "DISTILL_TEST_NO_SUCH_VARIABLE".into(),
            ..settings("https://example.com")
        };
        let error = HttpTeacher::new(&settings).err().unwrap();
        assert!(
            error
                .to_string()
                .contains("export DISTILL_TEST_NO_SUCH_VARIABLE=..."),
            "{error}"
        );
        assert_eq!(Exit::code_of(&error), 2);
    }
}
