//! API key and extra headers of requests, and the renewal of keys that expire.
//!
//! A key from a file or a command may expire in the night. When the endpoint refuses it, it is read again,
//! once for all requests that were on their way, and only a new one is tried.

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
use crate::config;
use crate::config::KeySource;
use crate::exit::Exit;

/// For a command that prints a key.
const LONGEST_COMMAND: Duration = Duration::from_secs(60);

/// For a key that has been taken before and is refused now: whoever renews it may be a little late.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(2);

/// Longest output of a command that is read, in bytes.
const LONGEST_OUTPUT: u64 = 1 << 16;

/// Wait for the rest of the output after the command has ended.
const REST_OF_OUTPUT: Duration = Duration::from_millis(500);

/// Headers that say how a request is sent.
const FRAMING: [&str; 10] = [
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

/// New keys that are refused, one after the other, before the endpoint is believed.
const REFUSED_KEYS: u32 = 2;

/// Snapshot of the headers that are sent with a request, and their secrets.
#[derive(Debug, Clone)]
pub(crate) struct RequestHeaders {
    pub headers: HeaderMap,
    pub secrets: Arc<Secrets>,
    /// Counts the keys.
    number: u64,
}

/// The key and the headers of one endpoint.
pub(crate) struct Credentials {
    settings: config::TeacherConfig,
    header: HeaderName,
    current: Mutex<Arc<RequestHeaders>>,
    /// Keys in a row that were refused.
    refused: AtomicU32,
    /// A key has been taken.
    is_known: AtomicBool,
    /// Held while a new key is read; the last failed attempt, by the number of the rejected key.
    fetching: tokio::sync::Mutex<Option<(u64, Instant)>>,
}

impl Credentials {
    /// Reads the key, and the variables that headers and query name.
    ///
    /// # Errors
    /// [`Exit::Usage`] where one is missing or cannot be sent.
    pub(crate) fn load(settings: &config::TeacherConfig) -> Result<Credentials> {
        let header = header_name("teacher.api_key_header", &settings.api_key_header)?;
        let mut headers = HeaderMap::new();
        let accepted = HeaderValue::from_static(response::encoding::ACCEPTED);
        headers.insert(ACCEPT_ENCODING, accepted);
        let mut secrets = Vec::new();
        let own = [
            ("OpenAI-Organization", &settings.organization),
            ("OpenAI-Project", &settings.project),
        ];
        let own = own.into_iter().filter(|(_, value)| !value.is_empty());
        let others = settings.headers.iter();
        for (name, value) in own.chain(others.map(|(name, value)| (name.as_str(), value))) {
            if FRAMING
                .iter()
                .any(|framing| name.eq_ignore_ascii_case(framing))
            {
                let message = format!(
                    "`teacher.headers.{name}` cannot be set: that header belongs to the connection"
                );
                return Err(Exit::Usage(message).into());
            }
            if name.eq_ignore_ascii_case(header.as_str())
                && settings.key_source() != KeySource::None
            {
                let message = format!(
                    "`teacher.headers.{name}` carries the key already: leave it out, or set \
                     `teacher.api_key_env = \"\"`"
                );
                return Err(Exit::Usage(message).into());
            }
            let place = format!("teacher.headers.{name}");
            let expanded = expand(&place, value)?;
            headers.insert(
                header_name(&place, name)?,
                header_value(&place, &expanded.text)?,
            );
            secrets.extend(expanded.secrets);
        }
        secrets.extend(expand("teacher.base_url", &settings.base_url)?.secrets);
        for (name, value) in &settings.query {
            secrets.extend(expand(&format!("teacher.query.{name}"), value)?.secrets);
        }
        let sent = RequestHeaders {
            headers,
            secrets: Arc::new(Secrets::new(secrets)?),
            number: 0,
        };
        let credentials = Credentials {
            settings: settings.clone(),
            header,
            current: Mutex::new(Arc::new(sent)),
            refused: AtomicU32::new(0),
            is_known: AtomicBool::new(false),
            fetching: tokio::sync::Mutex::default(),
        };
        if let Some(key) = read_key(settings)? {
            credentials.set(&key)?;
        }
        Ok(credentials)
    }

    /// Current snapshot.
    pub(crate) fn current(&self) -> Arc<RequestHeaders> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The endpoint takes what was sent.
    pub(crate) fn mark_accepted(&self) {
        self.refused.store(0, Ordering::Relaxed);
        self.is_known.store(true, Ordering::Relaxed);
    }

    /// The endpoint refuses what was `sent`. True where there is something else to send by now.
    pub(crate) async fn renew(self: &Arc<Self>, sent: &RequestHeaders) -> bool {
        if matches!(
            self.settings.key_source(),
            KeySource::None | KeySource::Variable(_)
        ) {
            return false;
        }
        let rejected_at = Instant::now();
        let mut failed = self.fetching.lock().await;
        if self.current().number != sent.number {
            return true;
        }
        if self.refused.load(Ordering::Relaxed) >= REFUSED_KEYS {
            return false;
        }
        // The requests that waited for the same attempt share its outcome.
        if failed.is_some_and(|(number, at)| number == sent.number && rejected_at < at) {
            return false;
        }
        let started = Instant::now();
        let fetched = loop {
            let this = Arc::clone(self);
            let fetched = tokio::task::spawn_blocking(move || this.fetch()).await;
            let fetched = fetched.map_err(anyhow::Error::from).flatten();
            let waits = self.is_known.load(Ordering::Relaxed) && started.elapsed() < PATIENCE;
            if !waits || matches!(fetched, Ok(true)) {
                break fetched;
            }
            tokio::time::sleep(PAUSE).await;
        };
        if !matches!(fetched, Ok(true)) {
            *failed = Some((sent.number, Instant::now()));
        }
        match fetched {
            Ok(is_new) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                if is_new {
                    tracing::info!("the endpoint refused the key, and there is a new one");
                }
                is_new
            }
            Err(error) => {
                tracing::warn!("the endpoint refuses the key, and there is no new one: {error:#}");
                false
            }
        }
    }

    /// Reads the key again; true if it is another one.
    fn fetch(&self) -> Result<bool> {
        let before = self.current();
        let Some(key) = read_key(&self.settings)? else {
            return Ok(false);
        };
        self.set(&key)?;
        let now = self.current();
        Ok(now.headers.get(&self.header) != before.headers.get(&self.header))
    }

    fn set(&self, key: &SecretString) -> Result<()> {
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
        let mut sent = RequestHeaders::clone(&current);
        sent.headers.insert(self.header.clone(), value);
        sent.secrets = Arc::new(sent.secrets.and([key.to_owned()])?);
        sent.number += 1;
        *current = Arc::new(sent);
        Ok(())
    }
}

/// A text of the config with its variables filled in.
pub(crate) struct Expanded {
    pub text: String,
    secrets: Vec<String>,
}

/// Fills in `${NAME}` in the value of the setting `place`.
///
/// # Errors
/// [`Exit::Usage`] where a variable is not set.
pub(crate) fn expand(place: &str, text: &str) -> Result<Expanded> {
    let mut expanded = Expanded {
        text: String::new(),
        secrets: Vec::new(),
    };
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            break;
        };
        let value = variable(name).ok_or_else(|| {
            Exit::Usage(format!(
                "the variable `{name}`, which `{place}` names, is not set: run `export {name}=...`, or change \
                 `{place}`"
            ))
        })?;
        expanded.text.push_str(before);
        expanded.text.push_str(&value);
        expanded.secrets.push(value);
        rest = after;
    }
    expanded.text.push_str(rest);
    Ok(expanded)
}

fn read_key(settings: &config::TeacherConfig) -> Result<Option<SecretString>> {
    let key = match settings.key_source() {
        KeySource::None => return Ok(None),
        KeySource::Variable(name) => {
            let key = variable(name).ok_or_else(|| {
                Exit::Usage(format!(
                    "the variable `{name}`, which `teacher.api_key_env` names, is not set: run `export \
                     {name}=...` with the key of the endpoint, or set `teacher.api_key_env = \"\"` for an \
                     endpoint that needs none"
                ))
            })?;
            return Ok(Some(key.into()));
        }
        KeySource::File(path) => crate::fs::read_to_string(path).map_err(|error| {
            Exit::Usage(format!("{error:#}: `teacher.api_key_file` holds the key"))
        })?,
        KeySource::Command(command) => output_of(command).map_err(|error| {
            Exit::Usage(format!(
                "`teacher.api_key_command` printed no key: {error:#}"
            ))
        })?,
    };
    let key = key.trim_start_matches('\u{feff}');
    let key = key.lines().map(str::trim).find(|line| !line.is_empty());
    let key = key.ok_or_else(|| {
        let place = match settings.key_source() {
            KeySource::File(path) => path.display().to_string(),
            _ => "`teacher.api_key_command`".to_owned(),
        };
        Exit::Usage(format!(
            "{place} gives no key: its first line that is not empty is the key"
        ))
    })?;
    Ok(Some(key.into()))
}

/// Standard output of a shell command.
fn output_of(command: &str) -> Result<String> {
    let child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.context("could not start it")?;
    let stdout = child.stdout.take().context("it has no output")?;
    // In a thread, since a process that the command leaves behind may hold the pipe open for ever.
    let (sender, pieces) = mpsc::channel();
    std::thread::spawn(move || {
        let mut stdout = stdout.take(LONGEST_OUTPUT);
        let mut piece = vec![0; 1 << 12];
        while let Ok(read @ 1..) = stdout.read(&mut piece) {
            if sender.send(piece[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > LONGEST_COMMAND {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it took longer than {} s", LONGEST_COMMAND.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if !status.success() {
        bail!("it ended with {status}");
    }
    let mut output = Vec::new();
    while let Ok(piece) = pieces.recv_timeout(REST_OF_OUTPUT) {
        output.extend(piece);
    }
    String::from_utf8(output).context("its output is not UTF-8")
}

/// Value of an environment variable that is set and not blank.
fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

fn header_name(place: &str, name: &str) -> Result<HeaderName> {
    HeaderName::try_from(name)
        .map_err(|_| Exit::Usage(format!("`{place}`: {name:?} is no name of a header")).into())
}

fn header_value(place: &str, value: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::try_from(value).map_err(|_| {
        Exit::Usage(format!(
            "{place} has characters that no header may have: set it again, without line ends"
        ))
    })?;
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
    async fn a_key_is_renewed_once_for_all_that_were_refused() {
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
            "another one is there by now"
        );
        assert_eq!(credentials.current().number, second.number);
        let said = bytes::Bytes::from_static(b"first-key-0123456789 second-key-0123456789");
        assert_eq!(second.secrets.clean(said), "[key] [key]");
        // New keys that are refused, one after the other, come to an end, until one is taken.
        std::fs::write(&file, "third-key-0123456789").unwrap();
        assert!(!credentials.renew(&second).await);
        credentials.mark_accepted();
        assert!(credentials.renew(&second).await);
    }

    #[tokio::test]
    async fn a_failed_renewal_is_shared_by_the_requests_that_wait_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, count) = (dir.path().join("key"), dir.path().join("count"));
        std::fs::write(&file, "a-key").unwrap();
        let command = format!("echo x >> {}; cat {}", count.display(), file.display());
        let credentials = Arc::new(Credentials::load(&with_command(&command)).unwrap());
        let sent = credentials.current();
        std::fs::remove_file(&file).unwrap();
        let waiting = (0..50).map(|_| {
            let (credentials, sent) = (Arc::clone(&credentials), Arc::clone(&sent));
            tokio::spawn(async move { credentials.renew(&sent).await })
        });
        for renewed in waiting.collect::<Vec<_>>() {
            assert!(!renewed.await.unwrap());
        }
        let runs = std::fs::read_to_string(&count).unwrap().lines().count();
        assert_eq!(runs, 2, "once at the start, once for all");
    }

    #[test]
    fn a_command_that_leaves_a_process_behind_does_not_hold_up_its_key() {
        let started = Instant::now();
        assert_eq!(output_of("sleep 20 & echo a-key").unwrap(), "a-key\n");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn commands_and_variables_that_give_no_key_are_named() {
        let cases = [
            ("exit 3", "exit status: 3"),
            ("echo", "gives no key"),
            ("printf 'a\\001b'", "no header may have"),
        ];
        for (command, part) in cases {
            let error = Credentials::load(&with_command(command)).err().unwrap();
            assert_eq!(Exit::code_of(&error), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
        let place = "teacher.headers.X-Team";
        let error = expand(place, "a ${DISTILL_TEST_NO_SUCH_VARIABLE} b");
        let error = error.err().unwrap().to_string();
        for part in ["export DISTILL_TEST_NO_SUCH_VARIABLE", place] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        assert!(!error.contains("api_key_env"), "{error}");
        assert_eq!(expand(place, "a ${").unwrap().text, "a ${");
    }

    #[test]
    fn the_key_goes_where_the_endpoint_wants_it() {
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
