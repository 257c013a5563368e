//! API key and extra headers of requests, and the renewal of keys that expire.
//!
//! A key from a file or a command may expire during a run. When the endpoint rejects it, the key is read again, once
//! for all requests in flight. If the endpoint accepted a key before, reading is repeated until the key has changed or
//! a timeout has passed.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};

use crate::client::response;
use crate::client::secrets::Secrets;
use crate::config::error::contains_key;
use crate::config::teacher::VARIABLE_START;
use crate::config::{self, KeySource};
use crate::exit::Exit;

/// Timeout of a command that prints a key.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Time to wait for a new key after the endpoint rejects a key that it accepted before: the program that writes the
/// new key may be late.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two attempts to read a new key.
const RENEWAL_PAUSE: Duration = Duration::from_secs(2);

/// Maximum number of bytes to read from a command's output.
const MAX_OUTPUT: u64 = 1 << 16;

/// Time to wait for remaining output after the command has ended.
const OUTPUT_TIMEOUT: Duration = Duration::from_millis(500);

/// Maximum number of consecutive renewals without an accepted key.
const MAX_REJECTED_KEYS: u32 = 2;

/// Snapshot of the headers of a request, and the secrets to remove from its reply.
#[derive(Debug, Clone)]
pub(crate) struct RequestHeaders {
    pub headers: HeaderMap,
    pub secrets: Arc<Secrets>,
    /// Version of the key, incremented by each renewal.
    key_version: u64,
}

/// API key and headers of one endpoint.
pub(crate) struct Credentials {
    settings: config::TeacherConfig,
    header: HeaderName,
    current: Mutex<Arc<RequestHeaders>>,
    /// Number of renewals since the endpoint last accepted a key, including those that read the same key.
    rejected_keys: AtomicU32,
    /// The endpoint has accepted a key.
    was_accepted: AtomicBool,
    /// Key version and end time of the last renewal that failed. Locked during a renewal.
    failed_renewal: tokio::sync::Mutex<Option<(u64, Instant)>>,
}

impl Credentials {
    /// Reads the key and expands the variables in the headers, the query and the base URL. Their values are removed
    /// from replies like a key, except for the host in the base URL, which may be a common word.
    ///
    /// # Errors
    /// [`Exit::Usage`] if a variable or the key is missing, or a value is not valid in a header.
    pub(crate) fn load(settings: &config::TeacherConfig) -> Result<Credentials> {
        let header = header_name("teacher.api_key_header", &settings.api_key_header)?;
        let mut headers = HeaderMap::new();
        let encodings = HeaderValue::from_static(response::encoding::ACCEPTED);
        headers.insert(ACCEPT_ENCODING, encodings);
        let mut secrets = Vec::new();
        for (setting, name, value) in settings.extra_headers() {
            let expanded = expand(&setting, value)?;
            headers.insert(
                header_name(&setting, name)?,
                header_value(&format!("`{setting}`"), &expanded.text)?,
            );
            secrets.extend(expanded.into_secrets());
        }
        secrets.extend(expand("teacher.base_url", &settings.base_url)?.into_address_secrets());
        for (name, value) in &settings.query {
            secrets.extend(expand(&format!("teacher.query.{name}"), value)?.into_secrets());
        }
        let initial = RequestHeaders {
            headers,
            secrets: Arc::new(Secrets::new(secrets)?),
            key_version: 0,
        };
        let credentials = Credentials {
            settings: settings.clone(),
            header,
            current: Mutex::new(Arc::new(initial)),
            rejected_keys: AtomicU32::new(0),
            was_accepted: AtomicBool::new(false),
            failed_renewal: tokio::sync::Mutex::default(),
        };
        if let Some(key) = read_key(settings)? {
            credentials.set_key(&key)?;
        }
        Ok(credentials)
    }

    /// Returns the current snapshot.
    pub(crate) fn current(&self) -> Arc<RequestHeaders> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that the endpoint accepted the key.
    pub(crate) fn mark_accepted(&self) {
        self.rejected_keys.store(0, Ordering::Relaxed);
        self.was_accepted.store(true, Ordering::Relaxed);
    }

    /// Renews the key after the endpoint rejected the headers `sent`. Returns true if a different key is in place.
    pub(crate) async fn renew(self: &Arc<Self>, sent: &RequestHeaders) -> bool {
        if matches!(
            self.settings.key_source(),
            KeySource::None | KeySource::Variable(_)
        ) {
            return false;
        }
        let rejected_at = Instant::now();
        let mut last_failure = self.failed_renewal.lock().await;
        if self.current().key_version != sent.key_version {
            return true;
        }
        if self.rejected_keys.load(Ordering::Relaxed) >= MAX_REJECTED_KEYS {
            return false;
        }
        // A renewal of this key failed while this request waited for the lock: another attempt would fail, too.
        if last_failure.is_some_and(|(version, failed_at)| {
            version == sent.key_version && rejected_at < failed_at
        }) {
            return false;
        }
        let started = Instant::now();
        let reloaded = loop {
            let this = Arc::clone(self);
            let reloaded = tokio::task::spawn_blocking(move || this.reload_key()).await;
            let reloaded = reloaded.map_err(anyhow::Error::from).flatten();
            let may_retry =
                self.was_accepted.load(Ordering::Relaxed) && started.elapsed() < RENEWAL_TIMEOUT;
            if !may_retry || matches!(reloaded, Ok(true)) {
                break reloaded;
            }
            tokio::time::sleep(RENEWAL_PAUSE).await;
        };
        if !matches!(reloaded, Ok(true)) {
            *last_failure = Some((sent.key_version, Instant::now()));
        }
        match reloaded {
            Ok(is_new) => {
                self.rejected_keys.fetch_add(1, Ordering::Relaxed);
                if is_new {
                    tracing::info!("the endpoint rejected the key: continuing with a new key");
                }
                is_new
            }
            Err(error) => {
                tracing::warn!(
                    "the endpoint rejected the key, and no new key could be read: {error:#}"
                );
                false
            }
        }
    }

    /// Reads the key again. Returns true if it has changed.
    fn reload_key(&self) -> Result<bool> {
        let before = self.current();
        let Some(key) = read_key(&self.settings)? else {
            return Ok(false);
        };
        self.set_key(&key)?;
        let now = self.current();
        Ok(now.headers.get(&self.header) != before.headers.get(&self.header))
    }

    /// Replaces the key and increments its version, unless the key is the same.
    fn set_key(&self, key: &SecretString) -> Result<()> {
        let key = key.expose_secret();
        let text = if self.header == AUTHORIZATION {
            format!("Bearer {}", key.strip_prefix("Bearer ").unwrap_or(key))
        } else {
            key.to_owned()
        };
        let value = header_value("the key", &text)?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.headers.get(&self.header) == Some(&value) {
            return Ok(());
        }
        let mut updated = RequestHeaders::clone(&current);
        updated.headers.insert(self.header.clone(), value);
        updated.secrets = Arc::new(updated.secrets.with([key.to_owned()])?);
        updated.key_version += 1;
        *current = Arc::new(updated);
        Ok(())
    }
}

/// Value of a setting with its `${NAME}` variables expanded.
pub(crate) struct Expanded {
    pub text: String,
    /// Start in `text` and value of each variable.
    variables: Vec<(usize, String)>,
}

impl Expanded {
    /// Returns the values of the variables.
    fn into_secrets(self) -> impl Iterator<Item = String> {
        self.variables.into_iter().map(|(_, value)| value)
    }

    /// Returns the secret parts of the variables in an address: the part after the host and the port, and parts of
    /// any variable that look like a key. `config::address` rejects addresses with a user name or a query.
    fn into_address_secrets(self) -> Vec<String> {
        let host = self.text.find("://").map_or(0, |start| start + 3);
        let host_length = self.text[host..].find(['/', '\\', '?', '#']);
        let host_end = host_length.map_or(self.text.len(), |length| host + length);
        let mut secrets = Vec::new();
        for (start, value) in self.variables {
            let parts = value.split('/').filter(|part| contains_key(part));
            secrets.extend(parts.map(str::to_owned));
            let after_host = value.get(host_end.saturating_sub(start)..);
            let after_host = after_host.unwrap_or_default().trim_matches('/');
            secrets.push(after_host.to_owned());
        }
        secrets
    }
}

/// Expands `${NAME}` in the value of `setting`.
///
/// # Errors
/// [`Exit::Usage`] if a variable is not set.
pub(crate) fn expand(setting: &str, text: &str) -> Result<Expanded> {
    let mut expanded = Expanded {
        text: String::new(),
        variables: Vec::new(),
    };
    let mut remaining = text;
    while let Some((before, after)) = remaining.split_once(VARIABLE_START) {
        let Some((name, after)) = after.split_once('}') else {
            break;
        };
        let value = variable(name).ok_or_else(|| {
            Exit::Usage(format!(
                "the environment variable `{name}` of `{setting}` is not set: run `export {name}=...`, or \
                 change `{setting}`"
            ))
        })?;
        expanded.text.push_str(before);
        let start = expanded.text.len();
        expanded.text.push_str(&value);
        expanded.variables.push((start, value));
        remaining = after;
    }
    expanded.text.push_str(remaining);
    Ok(expanded)
}

/// Reads the key from its variable, file or command. Returns None if the config names none of them.
fn read_key(settings: &config::TeacherConfig) -> Result<Option<SecretString>> {
    let key = match settings.key_source() {
        KeySource::None => return Ok(None),
        KeySource::Variable(name) => {
            let key = variable(name).ok_or_else(|| {
                Exit::Usage(format!(
                    "the environment variable `{name}` of `teacher.api_key_env` is not set: run `export \
                     {name}=...` with the API key, or set `teacher.api_key_env = \"\"` for an endpoint that \
                     needs no key"
                ))
            })?;
            return Ok(Some(key.into()));
        }
        KeySource::File(path) => crate::fs::read_to_string(path).map_err(|error| {
            Exit::Usage(format!("cannot read `teacher.api_key_file`: {error:#}"))
        })?,
        KeySource::Command(command) => command_output(command)
            .map_err(|error| Exit::Usage(format!("`teacher.api_key_command` failed: {error:#}")))?,
    };
    let key = key.trim_start_matches('\u{feff}');
    let key = key.lines().map(str::trim).find(|line| !line.is_empty());
    let key = key.ok_or_else(|| {
        let source = match settings.key_source() {
            KeySource::File(path) => path.display().to_string(),
            _ => "`teacher.api_key_command`".to_owned(),
        };
        Exit::Usage(format!(
            "{source} contains no key: the key must be its first non-empty line"
        ))
    })?;
    Ok(Some(key.into()))
}

/// Runs a shell command and returns its standard output.
fn command_output(command: &str) -> Result<String> {
    let child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.context("cannot start the command")?;
    let stdout = child.stdout.take().context("the command has no output")?;
    // Read in a thread, because a background process of the command may keep the pipe open forever.
    let (sender, chunks) = mpsc::channel();
    std::thread::spawn(move || {
        let mut stdout = stdout.take(MAX_OUTPUT);
        let mut chunk = vec![0; 1 << 12];
        while let Ok(read @ 1..) = stdout.read(&mut chunk) {
            if sender.send(chunk[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > COMMAND_TIMEOUT {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it took longer than {} s", COMMAND_TIMEOUT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if !status.success() {
        bail!("it ended with {status}");
    }
    let mut output = Vec::new();
    while let Ok(chunk) = chunks.recv_timeout(OUTPUT_TIMEOUT) {
        output.extend(chunk);
    }
    String::from_utf8(output).context("its output is not UTF-8")
}

/// Returns the trimmed value of an environment variable, unless it is blank.
fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

fn header_name(setting: &str, name: &str) -> Result<HeaderName> {
    config::address::header_name(setting, name).map_err(|message| Exit::Usage(message).into())
}

fn header_value(setting: &str, value: &str) -> Result<HeaderValue> {
    let mut value = config::address::header_value(setting, value).map_err(Exit::Usage)?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_command(command: &str) -> config::TeacherConfig {
        config::TeacherConfig {
            api_key_command: Some(command.into()),
            ..config::TeacherConfig::default()
        }
    }

    #[tokio::test]
    async fn key_is_renewed_once_for_all_rejected_requests() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "\n first-key-0123456789 \n").unwrap();
        let settings = config::TeacherConfig {
            api_key_file: Some(file.clone()),
            ..config::TeacherConfig::default()
        };
        let credentials = Arc::new(Credentials::load(&settings).unwrap());
        let first = credentials.current();
        assert_eq!(first.headers[AUTHORIZATION], "Bearer first-key-0123456789");
        assert!(!credentials.renew(&first).await, "it is the same key");
        std::fs::write(&file, "second-key-0123456789").unwrap();
        assert!(credentials.renew(&first).await);
        let second = credentials.current();
        assert!(
            credentials.renew(&first).await,
            "the key was renewed already"
        );
        assert_eq!(credentials.current().key_version, second.key_version);
        let reply = bytes::Bytes::from_static(b"first-key-0123456789 second-key-0123456789");
        assert_eq!(second.secrets.clean(reply), "[key] [key]");
        // After two rejected keys in a row, renewal stops until a key is accepted.
        std::fs::write(&file, "third-key-0123456789").unwrap();
        assert!(!credentials.renew(&second).await);
        credentials.mark_accepted();
        assert!(credentials.renew(&second).await);
    }

    #[tokio::test]
    async fn failed_renewal_is_shared_by_waiting_requests() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        let count = dir.path().join("count");
        std::fs::write(&file, "a-key").unwrap();
        let command = format!("echo x >> {}; cat {}", count.display(), file.display());
        let credentials = Arc::new(Credentials::load(&with_command(&command)).unwrap());
        let sent = credentials.current();
        std::fs::remove_file(&file).unwrap();
        let waiting = (0..50).map(|_| {
            let credentials = Arc::clone(&credentials);
            let sent = Arc::clone(&sent);
            tokio::spawn(async move { credentials.renew(&sent).await })
        });
        for renewed in waiting.collect::<Vec<_>>() {
            assert!(!renewed.await.unwrap());
        }
        let runs = std::fs::read_to_string(&count).unwrap().lines().count();
        assert_eq!(runs, 2, "one run at the start, one for all requests");
    }

    #[test]
    fn key_command_with_a_background_process_returns_at_once() {
        let started = Instant::now();
        assert_eq!(command_output("sleep 20 & echo a-key").unwrap(), "a-key\n");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn missing_key_errors_name_the_command_or_variable() {
        let cases = [
            ("exit 3", "exit status: 3"),
            ("echo", "contains no key"),
            ("printf 'a\\001b'", "not allowed in a header"),
        ];
        for (command, part) in cases {
            let error = Credentials::load(&with_command(command)).err().unwrap();
            assert_eq!(Exit::code_of(&error), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
        let setting = "teacher.headers.X-Team";
        let error = expand(setting, "a ${DISTILL_TEST_NO_SUCH_VARIABLE} b");
        let error = error.err().unwrap().to_string();
        for part in ["export DISTILL_TEST_NO_SUCH_VARIABLE", setting] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        assert!(!error.contains("api_key_env"), "{error}");
        assert_eq!(expand(setting, "a ${").unwrap().text, "a ${");
    }

    #[test]
    fn only_the_path_and_keys_of_an_address_are_secret() {
        let key = "sk-0123456789abcdef";
        let cases: [(&str, &str, &str, &[&str]); 6] = [
            ("https://", "research", ".openai.azure.com/v1", &[""]),
            ("", "https://api.example.com:8000/v1", "", &["v1"]),
            ("https://", "internal-gateway:8443", "", &[""]),
            ("https://x/", "a-secret-path", "/v1", &["a-secret-path"]),
            (
                "https://",
                "x.example/a-secret-path",
                "",
                &["a-secret-path"],
            ),
            ("https://", key, "/v1", &[key, ""]),
        ];
        for (before, value, after, expected) in cases {
            let expanded = Expanded {
                text: format!("{before}{value}{after}"),
                variables: vec![(before.len(), value.to_owned())],
            };
            assert_eq!(expanded.into_address_secrets(), expected, "{value}");
        }
    }

    #[test]
    fn api_key_header_replaces_the_authorization_header() {
        let settings = config::TeacherConfig {
            api_key_header: "api-key".into(),
            headers: [("X-Title".to_string(), "distill".to_string())].into(),
            organization: "org-1".into(),
            ..with_command("echo a-key")
        };
        let sent = Credentials::load(&settings).unwrap().current();
        assert_eq!(sent.headers["api-key"], "a-key");
        assert_eq!(sent.headers["x-title"], "distill");
        assert_eq!(sent.headers["openai-organization"], "org-1");
        assert!(!sent.headers.contains_key(AUTHORIZATION));
    }
}
