//! Sets up logging to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// Environment variable with the log filter. All other variables with the prefix `DISTILL_` are settings.
pub const VARIABLE: &str = "DISTILL_LOG";

/// Starts logging to stderr: warnings and errors, or the events that the filter in [`VARIABLE`] selects, such as
/// `DISTILL_LOG=debug`.
///
/// The HTTP crates log only warnings and errors. The events of async-openai are never logged, because they contain
/// whole request and response bodies.
pub fn set_up() {
    let filter = std::env::var(VARIABLE).unwrap_or_else(|_| "warn".into());
    let directives = format!(
        "{filter},async_openai=off,hyper=warn,hyper_util=warn,reqwest=warn,h2=warn,rustls=warn"
    );
    let use_colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    fmt()
        .with_env_filter(EnvFilter::new(directives))
        .with_writer(std::io::stderr)
        .with_ansi(use_colour)
        .with_target(false)
        .without_time()
        .init();
}
