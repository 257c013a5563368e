//! The upper limit for `tests/bench/harvest.sh`: a reqwest loop that neither parses nor keeps the replies.
//!
//! `bare URL ROWS CONCURRENCY [TOP_LOGPROBS MAX_TOKENS]` sends ROWS requests, CONCURRENCY at a time, and prints the
//! number of bytes received.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| {
        arguments
            .get(index)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let (Some(url), Some(rows), Some(concurrency)) = (arguments.first(), number(1), number(2))
    else {
        return Err("usage: bare URL ROWS CONCURRENCY [TOP_LOGPROBS MAX_TOKENS]".into());
    };
    let (top_logprobs, max_tokens) = (number(3).unwrap_or(0), number(4).unwrap_or(32));
    let url: Arc<str> = format!("{url}/chat/completions").into();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()?;
    let next = Arc::new(AtomicU64::new(0));
    let bytes = Arc::new(AtomicU64::new(0));
    let workers = (0..concurrency).map(|_| {
        let (url, client) = (Arc::clone(&url), client.clone());
        let (next, bytes) = (Arc::clone(&next), Arc::clone(&bytes));
        tokio::spawn(async move {
            loop {
                let row = next.fetch_add(1, Ordering::Relaxed);
                if row >= rows {
                    return Ok::<(), reqwest::Error>(());
                }
                // The same request as in `peers.py`.
                let content = format!("{:.<200}", format!("prompt number {row} "));
                let mut body = json!({
                    "model": "mock",
                    "messages": [{"role": "user", "content": content}],
                    "max_completion_tokens": max_tokens,
                });
                if top_logprobs > 0 {
                    body["logprobs"] = true.into();
                    body["top_logprobs"] = top_logprobs.into();
                }
                let response = client.post(&*url).json(&body).send().await?;
                let reply = response.error_for_status()?.bytes().await?;
                bytes.fetch_add(reply.len() as u64, Ordering::Relaxed);
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await??;
    }
    println!("{}", bytes.load(Ordering::Relaxed));
    Ok(())
}
