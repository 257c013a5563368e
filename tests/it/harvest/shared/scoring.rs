//! Scoring of texts under shared limits.

use std::sync::mpsc::channel;
use std::time::Duration;

use distill::data::text_scorer::TextScorer;
use distill::harvest::scorer::EndpointScorer;
use distill::signal::StopFlag;
use serde_json::json;

use super::super::scoring::{score_by_endpoint, text};
use super::server::Redis;
use super::{per_minute, run};
use crate::fault_server::{FaultServer, Reaction, RecordedRequest, reply};

/// Returns the logprobs of a conversation whose last message is one token.
fn prompt_logprobs(request: &RecordedRequest) -> Reaction {
    let token = json!({"logprob": -0.5, "decoded_token": request.prompt()});
    let body = json!({
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}],
        "prompt_logprobs": [null, {"7": token}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
    });
    reply(200, body)
}

#[test]
fn scorer_sends_requests_of_every_call_under_shared_limits() {
    let redis = Redis::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(FaultServer::start(prompt_logprobs));
    let mut run = run(&redis, 1, per_minute(60_000));
    run.config.teacher.base_url = server.base_url.clone();
    score_by_endpoint(&mut run.config);
    let (sender, scored) = channel();
    let config = run.config.clone();
    // A call that hangs must not block the test.
    std::thread::spawn(move || {
        let mut scorer = EndpointScorer::new(&config, true).unwrap().unwrap();
        for call in 0..3 {
            let texts = (0..4).map(|index| text(&format!("answer {call} {index}")));
            let logprobs = scorer.score(texts.collect(), &StopFlag::default()).unwrap();
            let scored = logprobs.iter().flatten().count();
            sender.send(scored).unwrap();
        }
    });
    for call in 1..=3 {
        let scored = scored.recv_timeout(Duration::from_secs(20));
        assert_eq!(scored.expect("a call hangs"), 4, "call {call}");
        assert_eq!(server.count(), 4 * call);
    }
}
