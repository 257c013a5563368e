//! `distill probe`: determines and prints the capabilities of the endpoints.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{Global, ProbeArgs};
use crate::probe::findings;
use crate::probe::findings::ProbedEndpoint;
use crate::terminal::{sanitise, table};

/// Probes every endpoint of the config and prints the findings.
///
/// # Errors
/// Also if the config uses something that an endpoint does not support.
pub fn run(args: &ProbeArgs, global: &Global) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let endpoints = runtime.block_on(crate::harvest::probe(&config))?;
    if global.json {
        super::print_json(&endpoints)?;
    } else {
        for endpoint in &endpoints.endpoints {
            super::print(&table(&rows(endpoint)))?;
        }
        let file = findings::file(&config.run_dir);
        super::print(&format!("saved to {}\n", file.display()))?;
    }
    for endpoint in config.endpoints() {
        if let Some(found) = endpoints.find(&endpoint) {
            for warning in found.check(&endpoint)? {
                tracing::warn!("{warning}");
            }
        }
    }
    Ok(())
}

/// Returns the rows of the table: name and value of each finding.
fn rows(endpoint: &ProbedEndpoint) -> Vec<[String; 2]> {
    let offer = &endpoint.logprobs;
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
        ["logprobs per token".into(), offer.largest_k.to_string()],
        ["logprobs kind".into(), value_name(&offer.kind)],
        ["token bytes".into(), value_name(&offer.bytes)],
        ["token ids".into(), yes_or_no(offer.token_ids)],
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

fn yes_or_no(holds: bool) -> String {
    if holds { "yes" } else { "no" }.into()
}

/// Returns the name of an enum value, as in `endpoint.json`.
fn value_name(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        _ => "unknown".into(),
    }
}
