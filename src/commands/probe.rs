//! `distill probe`: determines and prints the capabilities of the endpoints.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{GlobalArgs, ProbeArgs};
use crate::probe;
use crate::probe::findings::ProbedEndpoint;
use crate::terminal::{sanitise, table};

/// Probes every endpoint of the config, prints the findings, and warns of settings that do not fit the findings.
///
/// # Errors
/// If an endpoint cannot be probed, or the config uses a feature that an endpoint does not support.
pub fn run(args: &ProbeArgs, global: &GlobalArgs) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let findings = runtime.block_on(crate::harvest::probe(&config))?;
    if global.json {
        super::print_json(&findings)?;
    } else {
        for endpoint in &findings.endpoints {
            super::print(&table(&rows(endpoint)))?;
        }
        let file = probe::findings::file(&config.run_dir);
        super::print(&format!("saved to {}\n", file.display()))?;
    }
    for endpoint in config.endpoints() {
        if let Some(probed) = findings.find(&endpoint) {
            for warning in probed.check(&endpoint)? {
                tracing::warn!("{warning}");
            }
        }
    }
    Ok(())
}

/// Returns the table rows of one endpoint: name and value of each finding.
fn rows(endpoint: &ProbedEndpoint) -> Vec<[String; 2]> {
    let logprobs = &endpoint.logprobs;
    let mut rows = vec![
        ["endpoint", &endpoint.base_url].map(String::from),
        ["model", &endpoint.reported_model].map(String::from),
        ["requests sent".into(), endpoint.requests.to_string()],
        [
            "token limit field".into(),
            endpoint
                .max_tokens_field
                .map_or("unknown", |field| field.name())
                .into(),
        ],
        ["logprobs per token".into(), logprobs.largest_k.to_string()],
        ["logprobs kind".into(), value_name(&logprobs.kind)],
        ["token bytes".into(), value_name(&logprobs.bytes)],
        ["token ids".into(), yes_or_no(logprobs.token_ids)],
        ["usage".into(), yes_or_no(endpoint.reports_usage)],
        ["reasoning model".into(), yes_or_no(endpoint.thinks)],
        [
            "multiple choices (n)".into(),
            endpoint.several_choices.map_or("refused".into(), yes_or_no),
        ],
        ["seed".into(), value_name(&endpoint.seed)],
        ["JSON schema".into(), value_name(&endpoint.structured)],
        [
            "prompt logprobs".into(),
            value_name(&endpoint.prompt_logprobs),
        ],
        [
            "rate limit headers".into(),
            if endpoint.limits.is_empty() {
                "none".into()
            } else {
                endpoint.limits.join(", ")
            },
        ],
        ["error format".into(), endpoint.error_shape.clone()],
    ];
    for (parameter, message) in &endpoint.refused {
        rows.push([format!("refuses {parameter}"), message.clone()]);
    }
    for row in &mut rows {
        row[1] = sanitise(&row[1]).into_owned();
    }
    rows
}

fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.into()
}

/// Returns the name of an enum value, as in `endpoint.json`.
fn value_name(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        _ => "unknown".into(),
    }
}
