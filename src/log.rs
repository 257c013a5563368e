//! Logging to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// What is logged; the one `DISTILL_` variable that is no setting.
pub const VARIABLE: &str = "DISTILL_LOG";

/// Shows warnings, or what [`VARIABLE`] asks for (as in `DISTILL_LOG=debug`).
///
/// The HTTP crates are capped: async-openai logs whole request and response bodies.
pub fn set_up() {
    let filter = std::env::var(VARIABLE).unwrap_or_else(|_| "warn".into());
    let capped = format!(
        "{filter},async_openai=off,hyper=warn,hyper_util=warn,reqwest=warn,h2=warn,rustls=warn"
    );
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    fmt()
        .with_env_filter(EnvFilter::new(capped))
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .without_time()
        .init();
}
