//! Scoring of given texts through an endpoint.

use distill::config::{Config, ScoredBy};
use distill::data::text_scorer::TextScorer;
use distill::exit::Exit;
use distill::harvest::scorer::EndpointScorer;
use distill::prompt::Prompt;
use distill::prompt::message::Message;
use distill::signal::StopFlag;

use super::Run;
use crate::fault_server::{FaultServer, error, reply};

/// Configures on-policy training whose answers the teacher of `config` scores.
pub fn score_by_endpoint(config: &mut Config) {
    config.sampling.top_logprobs = 2;
    config.train.on_policy = true;
    config.on_policy.judge = ScoredBy::PromptLogprobs;
}

/// Returns a conversation that ends with `answer`.
pub fn text(answer: &str) -> Prompt {
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    let messages = vec![message("user", "question"), message("assistant", answer)];
    Prompt::plain(answer, messages)
}

#[test]
fn call_after_a_failed_larger_call_ends_with_an_error() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(FaultServer::start(|_| {
        reply(500, error("the model has crashed", "internal_error"))
    }));
    let mut run = Run::new(&server, &["question"]);
    score_by_endpoint(&mut run.config);
    let mut scorer = EndpointScorer::new(&run.config, true).unwrap().unwrap();
    for answers in [&["a", "b", "c", "d"][..], &["e"]] {
        let sent_before = server.count();
        let texts = answers.iter().map(|answer| text(answer)).collect();
        let error = scorer.score(texts, &StopFlag::default()).unwrap_err();
        assert!(Exit::code_of(&error) > 0, "{error:#}");
        assert!(server.count() > sent_before);
    }
}
