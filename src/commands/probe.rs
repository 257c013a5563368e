//! `distill probe`: what an endpoint really does.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{Global, ProbeArgs};
use crate::probe::findings;
use crate::probe::findings::ProbedEndpoint;
use crate::terminal::{sanitise, table};

/// Probes every endpoint of the config, prints what was found, and fails where the config asks for
/// something else.
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
        super::print(&format!("kept in {}\n", file.display()))?;
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

fn rows(endpoint: &ProbedEndpoint) -> Vec<[String; 2]> {
    let offer = &endpoint.logprobs;
    let mut rows = vec![
        ["endpoint", &endpoint.base_url].map(String::from),
        ["model", &endpoint.reported_model].map(String::from),
        ["requests sent".into(), endpoint.requests.to_string()],
        [
            "limit on the answer".into(),
            endpoint
                .max_tokens_field
                .map_or("unknown", |field| field.name())
                .into(),
        ],
        ["logprobs a token".into(), offer.largest_k.to_string()],
        ["logprobs are".into(), word(&offer.kind)],
        ["token bytes".into(), word(&offer.bytes)],
        ["token ids".into(), yes(offer.token_ids)],
        ["usage".into(), yes(endpoint.reports_usage)],
        ["thinks first".into(), yes(endpoint.thinks)],
        [
            "several choices (n)".into(),
            endpoint.several_choices.map_or("refused".into(), yes),
        ],
        ["seed".into(), word(&endpoint.seed)],
        ["JSON schema".into(), word(&endpoint.structured)],
        [
            "logprobs of given texts".into(),
            word(&endpoint.prompt_logprobs),
        ],
        [
            "limits in its headers".into(),
            match endpoint.limits.is_empty() {
                true => "none".into(),
                false => endpoint.limits.join(", "),
            },
        ],
        ["errors".into(), endpoint.error_shape.clone()],
    ];
    for (parameter, words) in &endpoint.refused {
        rows.push([format!("refuses {parameter}"), words.clone()]);
    }
    for row in &mut rows {
        row[1] = sanitise(&row[1]).into_owned();
    }
    rows
}

fn yes(holds: bool) -> String {
    if holds { "yes" } else { "no" }.into()
}

/// The value's name, as in the file.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "unknown".into(),
    }
}
