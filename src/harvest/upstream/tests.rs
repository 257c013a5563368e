use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;

use crate::cache::question::KeyVariants;
use crate::client::request::RequestTemplate;
use crate::client::transport::{HttpReply, TransportError};
use crate::config::Config;
use crate::harvest::upstream::*;
use crate::plan::{PlanScope, RowStatus};
use crate::prompt::Prompt;
use crate::prompt::message::Message;

/// A transport that refuses every connection.
struct NoTeacher;

impl Transport for NoTeacher {
    fn complete<'a>(
        &'a self,
        _body: &'a Value,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async { Err(TransportError::Unreachable("refused".into())) }.boxed()
    }
}

fn plan(config: &Config) -> Plan {
    let prompts = (0..20).map(|number| {
        let text = format!("prompt {number}");
        Prompt::plain(number.to_string(), vec![Message::new("user", text)])
    });
    let endpoints = config.endpoints().into_iter();
    let plan = Plan::new(
        prompts.collect(),
        endpoints.map(RequestTemplate::plain).collect(),
        &config.prompts,
        PlanScope::default(),
        &KeyVariants::default(),
        |_| Ok(RowStatus::Open),
    );
    plan.unwrap()
}

fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    config.teacher.model = "m".into();
    change(&mut config);
    config
}

fn upstream(config: &Config, plan: &Plan) -> Upstream {
    let daily_limit = DailyLimit::new(config.limits.requests_per_day, &[], Instant::now());
    let settings = RunSettings::new(config).unwrap();
    Upstream::new(plan, 0, Arc::new(NoTeacher), daily_limit, None, &settings).unwrap()
}

/// Sends the next row; its reply is an answer.
fn send_answered(upstream: &mut Upstream, plan: &Plan) {
    let ticket = send(upstream, plan).0;
    upstream.answered(&ticket, &[], None);
}

/// Sends the next row; its reply fails with status 503.
fn send_failing(upstream: &mut Upstream, plan: &Plan) {
    let entry = send(upstream, plan).1;
    upstream.transient(entry, RowFailure::new("http 503", "busy"), Duration::ZERO);
}

fn send(upstream: &mut Upstream, plan: &Plan) -> (SendTicket, QueuedRow) {
    let entry = upstream.next_row().ok().unwrap();
    let ticket = upstream.admit(plan.largest(0)).unwrap();
    upstream.queue.take(entry);
    upstream.request_sent(&ticket);
    upstream.reply_received(&ticket, &[]);
    (ticket, entry)
}

const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test(start_paused = true)]
async fn time_between_two_plans_is_not_an_outage() {
    let config = config(|_| {});
    let plan = plan(&config);
    let mut upstream = upstream(&config, &plan);
    send_answered(&mut upstream, &plan);
    for _ in 0..3 {
        tokio::time::advance(20 * HOUR).await;
        upstream.resume_with(&plan, 0).unwrap();
        send_failing(&mut upstream, &plan);
        assert!(upstream.take_error().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn wait_for_the_daily_limit_is_not_an_outage() {
    let config = config(|config| config.limits.requests_per_day = Some(1));
    let plan = plan(&config);
    let mut upstream = upstream(&config, &plan);
    send_answered(&mut upstream, &plan);
    let until = upstream.admit(plan.largest(0)).err().unwrap();
    assert!(until - Instant::now() >= 24 * HOUR);
    while Instant::now() < until {
        let wait = (until - Instant::now()).min(Duration::from_secs(60));
        tokio::time::advance(wait).await;
        upstream.exclude_held_back(wait, false);
    }
    send_failing(&mut upstream, &plan);
    assert!(upstream.take_error().is_none());
}

#[tokio::test(start_paused = true)]
async fn pause_of_the_run_is_excluded_from_an_outage_and_backoff_is_not() {
    let config = config(|config| config.retry.max_outage = HOUR);
    let plan = plan(&config);
    let mut upstream = upstream(&config, &plan);
    tokio::time::advance(2 * HOUR).await;
    upstream.exclude_held_back(2 * HOUR, true);
    send_failing(&mut upstream, &plan);
    assert!(upstream.take_error().is_none());
    // The pause after a failure is not excluded.
    upstream.exclude_held_back(HOUR, true);
    tokio::time::advance(HOUR).await;
    send_failing(&mut upstream, &plan);
    let error = upstream.take_error().unwrap().to_string();
    assert!(error.contains("for 1 h 0 min"), "{error}");
}
