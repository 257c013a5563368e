//! Sets up logging to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// Environment variable with the log filter. It is the only `DISTILL_` variable that is not a setting.
pub const VARIABLE: &str = "DISTILL_LOG";

/// Logs warnings, or what the filter in [`VARIABLE`] selects (for example `DISTILL_LOG=debug`).
///
/// The level of the HTTP crates is capped: async-openai logs whole request and response bodies.
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
