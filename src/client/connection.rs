//! Connection settings of an endpoint: base URL, TLS certificates, timeouts, proxy.

use std::path::Path;

use anyhow::{Context as _, Result};
use reqwest::{Certificate, Identity, Url};

use crate::client::credentials::expand;
use crate::config;
use crate::exit::Exit;

/// Validated address of an endpoint.
#[derive(Debug)]
pub(crate) struct EndpointAddress {
    /// The base URL, its `${NAME}` variables expanded.
    base: Url,
    /// Query parameters of every request.
    query: Vec<(String, String)>,
}

impl EndpointAddress {
    /// Expands and checks `teacher.base_url`. It must be https, or http where that is allowed, and must not contain
    /// credentials, a query or the path of an API method. Also expands the query parameters.
    ///
    /// # Errors
    /// [`Exit::Usage`] if an environment variable is not set or the address is not accepted, with the change to make.
    pub(crate) fn from_config(settings: &config::TeacherConfig) -> Result<EndpointAddress> {
        let text = expand("teacher.base_url", &settings.base_url)?.text;
        let url = config::address::parse(settings, &text)
            .map_err(|mistake| Exit::Usage(mistake.message))?;
        let expand_pair = |(name, value): (&String, &String)| {
            let setting = format!("teacher.query.{name}");
            Ok((name.clone(), expand(&setting, value)?.text))
        };
        Ok(EndpointAddress {
            base: url,
            query: settings
                .query
                .iter()
                .map(expand_pair)
                .collect::<Result<_>>()?,
        })
    }

    /// Returns the URL of an API method, such as `chat/completions`, with the query parameters of the config.
    pub(crate) fn method_url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!(
            "{}/{path}",
            self.base.path().trim_end_matches('/')
        ));
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        url
    }
}

/// Builds the HTTP client with its connection pool.
///
/// # Errors
/// [`Exit::Usage`] if a certificate of the config cannot be read; another error if the proxy or the system's
/// certificates are invalid.
pub(crate) fn client(
    settings: &config::TeacherConfig,
    address: &EndpointAddress,
) -> Result<reqwest::Client> {
    // Fails only if a crypto provider is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("distill/", env!("CARGO_PKG_VERSION")))
        // A redirect could send the key and the prompts to another host.
        .redirect(reqwest::redirect::Policy::none())
        // The dispatcher retries, under the rate limit.
        .retry(reqwest::retry::never())
        // Invalid headers from a gateway must not cost a paid answer. hyper's limit of 100 headers stays: a
        // higher one costs every reply 2 % of its CPU time.
        .http1_ignore_invalid_headers_in_responses(true)
        .connect_timeout(settings.connect_timeout)
        .timeout(settings.timeout);
    if config::address::is_loopback(&address.base) {
        builder = builder.no_proxy();
    }
    if let Some(path) = &settings.client_certificate {
        let identity = Identity::from_pem(&read_file(path)?);
        builder = builder.identity(identity.map_err(|error| {
            Exit::Usage(format!(
                "`teacher.client_certificate` {} is not a PEM file with a certificate and its key: {error}",
                path.display()
            ))
        })?);
    }
    if let Some(path) = &settings.ca_file {
        let no_certificate = |cause: &str| {
            Exit::Usage(format!(
                "`teacher.ca_file` {} contains no PEM certificate{cause}",
                path.display()
            ))
        };
        let certificates = Certificate::from_pem_bundle(&read_file(path)?)
            .map_err(|error| no_certificate(&format!(": {error}")))?;
        if certificates.is_empty() {
            return Err(no_certificate("").into());
        }
        builder = builder.tls_certs_merge(certificates);
    } else if address.base.scheme() == "http" {
        // Plain HTTP verifies no certificate, so the machine need not have any installed.
        builder = builder.tls_certs_only([]);
    }
    builder.build().context(
        "cannot set up the HTTP client (check the proxy in HTTPS_PROXY or ALL_PROXY, and the certificates in \
         SSL_CERT_FILE)",
    )
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    crate::fs::read(path).map_err(|error| Exit::Usage(format!("{error:#}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::http::HttpTeacher;
    use crate::config::AllowHttp;

    fn settings(url: &str) -> config::TeacherConfig {
        config::TeacherConfig {
            base_url: url.into(),
            api_key_env: String::new(),
            ..config::TeacherConfig::default()
        }
    }

    #[test]
    fn plain_http_is_accepted_for_loopback_addresses_only() {
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
            (
                "https://user:pw@example.com",
                "must not contain a user name",
            ),
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
    fn allow_http_permits_plain_http_to_remote_hosts() {
        let load_error = |allow_http: AllowHttp, command: Option<&str>| {
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
            load_error(AllowHttp::No, None)
                .unwrap()
                .contains("allow_http = true")
        );
        assert_eq!(load_error(AllowHttp::WithoutKey, None), None);
        assert!(
            load_error(AllowHttp::WithoutKey, key)
                .unwrap()
                .contains("with_key")
        );
        assert_eq!(load_error(AllowHttp::WithKey, key), None);
    }

    #[test]
    fn missing_key_error_names_the_environment_variable() {
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
