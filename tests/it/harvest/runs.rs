//! Requests, records, limits and output of runs without faults.

use std::path::Path;
use std::time::Duration;

use distill::cache::record::Status;
use distill::exit::Exit;
use distill::harvest;
use distill::harvest::options::HarvestOptions;
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use tokio::sync::mpsc::unbounded_channel;

use super::{Run, exit_of, quiet_options};
use crate::fault_server::{
    FaultServer, Reaction, RecordedRequest, answer, completion, error, reply,
};

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_recorded_once_with_their_logprobs() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    run.config.price.input = Some(1.0);
    run.config.price.output = Some(2.0);

    let summary = run.harvest().await;
    assert_eq!(exit_of(&summary).0, 0);
    assert_eq!((summary.total, summary.ok, summary.requests), (3, 3, 3));
    assert_eq!(
        (summary.usage.prompt_tokens, summary.usage.completion_tokens),
        (30, 11)
    );
    assert!((summary.cost_usd.unwrap() - 52e-6).abs() < 1e-12);
    assert_eq!(run.texts(), ["ONE", "THREE", "TWO"]);

    let record = run
        .records()
        .into_iter()
        .find(|record| record.answer.text == "ONE")
        .unwrap();
    assert_eq!(
        (record.status, record.answer.finish_reason.as_str()),
        (Status::Ok, "stop")
    );
    assert_eq!(
        (record.model.as_str(), record.endpoint.as_str()),
        ("m-reported", server.base_url.as_str())
    );
    assert_eq!(record.request["top_logprobs"], 20);
    assert_eq!(record.timing.attempts, 1);
    let logprobs = record.logprobs.unwrap();
    assert!(logprobs.matches_text);
    assert_eq!(logprobs.token, ["O", "N", "E"]);
    assert_eq!(
        (logprobs.top[2].len(), logprobs.top[2][19].as_str()),
        (20, "t19")
    );
    assert_eq!(logprobs.top_logprob[0][1], Some(-1.5));

    let seen = server.requests();
    assert_eq!(seen[0].path, "/v1/chat/completions");
    assert_eq!(seen[0].header("authorization"), None);

    let second = run.harvest().await;
    assert_eq!((second.cached, second.ok, second.requests), (3, 0, 0));
    assert_eq!(server.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_changed_rows_are_requested_again() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &[]);
    run.config.prompts.source = run.dir.path().join("rows.jsonl");
    run.config.prompts.template = Some(run.dir.path().join("template.toml"));
    run.write(
        "rows.jsonl",
        "{\"id\":1,\"q\":\"a\"}\n{\"id\":2,\"q\":\"b\"}",
    );
    run.write("template.toml", "system = \"s\"\nuser = \"{{ q }}\"");
    assert_eq!(run.harvest().await.requests, 2);

    run.write(
        "rows.jsonl",
        "{\"id\":1,\"q\":\"a\"}\n{\"id\":2,\"q\":\"changed\"}",
    );
    let summary = run.harvest().await;
    assert_eq!((summary.cached, summary.requests), (1, 1));
    assert_eq!(server.requests().last().unwrap().prompt(), "changed");

    let example = "examples = [{ user = \"x\", assistant = \"y\" }]";
    run.write(
        "template.toml",
        &format!("system = \"s\"\nuser = \"{{{{ q }}}}\"\n{example}"),
    );
    assert_eq!(run.harvest().await.requests, 2);
    assert_eq!(
        server.requests().last().unwrap().body["messages"]
            .as_array()
            .unwrap()
            .len(),
        4
    );

    run.write("template.toml", "system = \"t\"\nuser = \"{{ q }}\"");
    assert_eq!(run.harvest().await.requests, 2);

    run.config.limits.requests_per_minute = Some(6_000);
    run.config.retry.max_attempts = 2;
    assert_eq!(
        run.harvest().await.requests,
        0,
        "limits or retries are part of the key"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_of_a_prompt_have_different_seeds() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a"]);
    run.config.prompts.samples = 3;
    run.config.sampling.seed = Some(40);
    assert_eq!(run.harvest().await.ok, 3);
    let mut seeds: Vec<_> = server
        .requests()
        .iter()
        .map(|seen| seen.body["seed"].as_i64().unwrap())
        .collect();
    seeds.sort();
    assert_eq!(seeds, [40, 41, 42]);
    let mut samples: Vec<_> = run.records().iter().map(|record| record.sample).collect();
    samples.sort();
    assert_eq!(samples, [0, 1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn request_over_limit_is_an_error_before_sending() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a"]);
    run.config.limits.tokens_per_minute = Some(50);
    run.config.sampling.max_tokens = 100;
    let error = run.harvest_error().await;
    assert_eq!(Exit::code_of(&error), 2);
    assert!(
        error
            .to_string()
            .contains("`limits.tokens_per_minute` = 50"),
        "{error}"
    );
    assert_eq!(server.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrency_limit_is_respected() {
    let server = FaultServer::start(|seen| {
        Reaction::After(Duration::from_millis(20), Box::new(answer(seen)))
    })
    .await;
    let mut run = Run::with_numbered_prompts(&server, 20);
    run.config.limits.concurrency = 4;
    let observe = async {
        let mut max_in_flight = 0;
        while server.count() < 20 {
            max_in_flight = max_in_flight.max(server.in_flight());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        max_in_flight
    };
    let (summary, max_in_flight) = tokio::join!(run.harvest(), observe);
    assert_eq!(summary.ok, 20);
    assert_eq!(max_in_flight, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn first_signal_drains_and_second_stops_immediately() {
    let server = FaultServer::start(|seen| match seen.prompt() {
        "never" => Reaction::Stall,
        _ => Reaction::After(Duration::from_millis(100), Box::new(answer(seen))),
    })
    .await;
    // Harvests, and sends signals after the given number of requests.
    let harvest_with_signals = async |run: &Run, signals: &[u8], requests: usize| {
        let (sender, receiver) = unbounded_channel();
        let before = server.count();
        let send = async {
            while server.count() < before + requests {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            for signal in signals {
                sender.send(*signal).unwrap();
            }
        };
        let (summary, ()) = tokio::join!(run.try_harvest(Signals::from_channel(receiver)), send);
        summary.unwrap()
    };

    let mut run = Run::new(&server, &["a", "b", "c", "d", "e"]);
    run.config.limits.concurrency = 2;
    // The first request is sent alone, then two at a time.
    let drained = harvest_with_signals(&run, &[2], 3).await;
    assert_eq!(
        (exit_of(&drained).0, drained.ok, drained.pending),
        (130, 3, 2)
    );
    assert_eq!(run.records().len(), 3);
    let resumed = run.harvest().await;
    assert_eq!((resumed.cached, resumed.ok), (3, 2));

    let run = Run::new(&server, &["never"]);
    let stopped = harvest_with_signals(&run, &[15, 15], 1).await;
    assert_eq!((exit_of(&stopped).0, stopped.pending), (143, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_run_sends_and_writes_nothing() {
    let server = FaultServer::start(answer).await;
    let run = Run::new(&server, &["a", "b", "c"]);
    let options = HarvestOptions {
        dry_run: true,
        ..HarvestOptions::default()
    };
    // A dry run reports the configuration errors that a run would report.
    type Change = fn(&mut distill::config::Config);
    let changes: [(Change, &str); 3] = [
        (
            |config| config.teacher.api_key_env = "DISTILL_TEST_NO_SUCH_VARIABLE".into(),
            "DISTILL_TEST_NO_SUCH_VARIABLE",
        ),
        (|config| config.budget.usd = Some(1.0), "price"),
        (
            |config| config.student.path = "no-such-student".into(),
            "tokenizer.json",
        ),
    ];
    for (change, part) in changes {
        let mut config = run.config.clone();
        change(&mut config);
        let outcome = harvest::run(&config, options.clone()).await;
        let error = outcome.and_then(HarvestSummary::into_result).err().unwrap();
        assert_eq!(distill::exit::Exit::code_of(&error), 2, "{error:#}");
        assert!(format!("{error:#}").contains(part), "{part}: {error:#}");
    }
    let summary = harvest::run(&run.config, options.clone()).await.unwrap();
    assert_eq!((summary.total, summary.cached, summary.pending), (3, 0, 3));
    assert_eq!(summary.estimate.unwrap().completion_tokens, 48);
    assert_eq!(server.count(), 0);
    assert!(!run.config.run_dir.exists());

    run.harvest().await;
    let summary = harvest::run(&run.config, options).await.unwrap();
    assert_eq!((summary.cached, summary.pending), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_run_shows_remaining_budget_and_waits() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a", "b", "c"]);
    let price = &mut run.config.price;
    (price.input, price.output) = (Some(1.0), Some(1.0));
    price.as_of = Some(jiff::Zoned::now().date().to_string().parse().unwrap());
    run.config.budget.usd = Some(1.0);
    run.config.limits.requests_per_day = Some(3);
    let spent = run.harvest().await.run_folder_usd.unwrap();
    assert!(spent > 0.0);
    let prompts: String = (0..100)
        .map(|number| format!("prompt {number}\n"))
        .collect();
    run.write("prompts.txt", &prompts);
    // The budget covers one request, but not a hundred.
    run.config.budget.usd = Some(0.0002);
    let time_in_hours = |hours: i64| {
        let zoned = jiff::Zoned::now().in_tz("UTC").unwrap();
        let time = zoned.checked_add(jiff::SignedDuration::from_hours(hours));
        time.unwrap().strftime("%H:%M").to_string()
    };
    let window = format!("{}-{}", time_in_hours(2), time_in_hours(3));
    run.config.schedule.timezone = Some("UTC".parse().unwrap());
    run.config.schedule.window = Some(window.parse().unwrap());
    let ledger = run.config.run_dir.join("ledger.json");
    let before = std::fs::read(&ledger).unwrap();
    let options = HarvestOptions {
        dry_run: true,
        ..quiet_options()
    };
    let summary = harvest::run(&run.config, options.clone()).await.unwrap();
    assert_eq!(summary.run_folder_usd, Some(spent));
    let table = summary.to_table();
    for part in [
        "are spent",
        "the run may stop early",
        "outside the window",
        "`limits.requests_per_day` of",
    ] {
        assert!(table.contains(part), "{part} is not in: {table}");
    }
    // The smallest accepted budget covers one request alone, but not in addition to the amount spent.
    let mut micro_usd = 100;
    let summary = loop {
        run.config.budget.usd = Some(f64::from(micro_usd) / 1e6);
        if let Ok(summary) = harvest::run(&run.config, options.clone()).await {
            break summary;
        }
        micro_usd += 1;
    };
    let table = summary.to_table();
    assert!(table.contains("nothing would be sent"), "{table}");
    assert_eq!(std::fs::read(&ledger).unwrap(), before);
}

/// Variable with the key of [`api_key_is_sent_and_never_shown_or_stored`]. A test cannot set a variable without
/// `unsafe` code, and PATH is always set and long enough.
const KEY_VARIABLE: &str = "PATH";

#[tokio::test(flavor = "multi_thread")]
async fn api_key_is_sent_and_never_shown_or_stored() {
    let key = std::env::var(KEY_VARIABLE).unwrap();
    let received_key = |seen: &RecordedRequest| {
        seen.header("authorization").unwrap()["Bearer ".len()..].to_string()
    };
    let server = FaultServer::start(move |seen| match seen.prompt() {
        "answer" => reply(200, completion(&received_key(seen), 0)),
        "refused" => reply(400, error(&format!("bad key {}", received_key(seen)), "")),
        _ => reply(401, error(&format!("bad key {}", received_key(seen)), "")),
    })
    .await;
    let mut run = Run::new(&server, &["answer", "refused"]);
    run.config.teacher.api_key_env = KEY_VARIABLE.into();
    let mut outputs = vec![format!("{:?}", run.harvest().await)];
    let header = server.requests()[0]
        .header("authorization")
        .unwrap()
        .to_string();
    assert_eq!(header, format!("Bearer {key}"));

    run.write("prompts.txt", "stop");
    let summary = run.harvest().await;
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 1);
    assert!(
        message.contains("bad key [key]") && message.contains("`PATH`"),
        "{message}"
    );
    outputs.push(message);
    for entry in files(&run.config.run_dir) {
        outputs.push(String::from_utf8_lossy(&std::fs::read(entry).unwrap()).into_owned());
    }
    assert!(outputs.len() >= 4);
    for output in outputs {
        assert!(!output.contains(&key), "{output}");
    }
}

/// Returns the files below a folder.
fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            paths.extend(files(&path))
        } else {
            paths.push(path)
        }
    }
    paths
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_violations_are_quarantined_and_counted() {
    let server = FaultServer::start(|seen| match seen.prompt() {
        "good" => reply(200, completion("{\"n\": 1}", 0)),
        "wrong" => reply(200, completion("{\"n\": \"one\"}", 0)),
        _ => reply(200, completion("n is one", 0)),
    })
    .await;
    let mut run = Run::new(&server, &["good", "wrong", "words"]);
    run.write(
        "call.json",
        r#"{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}"#,
    );
    run.config.sampling.schema = Some(run.dir.path().join("call.json"));
    run.config.sampling.top_logprobs = 0;
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.quarantined), (1, 2));
    assert_eq!(summary.quarantines["schema: `/n` against `type`"], 1);
    assert_eq!(summary.quarantines["schema: no JSON"], 1);
    let response_format = &server.requests()[0].body["response_format"];
    assert_eq!(response_format["json_schema"]["name"], "call");
    let second = run.harvest().await;
    assert_eq!(second.requests, 0, "a quarantined answer was bought again");
}

#[tokio::test(flavor = "multi_thread")]
async fn budget_needs_prices_and_covers_one_request() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a", "b"]);
    run.config.budget.usd = Some(1.0);
    let assert_refused = async |run: &Run, part: &str| {
        let error = run.harvest_error().await;
        assert_eq!(Exit::code_of(&error), 2);
        assert!(error.to_string().contains(part), "{error}");
    };
    assert_refused(&run, "has no price").await;
    run.config.price.input = Some(1.0);
    run.config.price.output = Some(2.0);
    run.config.budget.usd = Some(0.000_001);
    assert_refused(&run, "lower `sampling.max_tokens` or raise the budget").await;
    assert_eq!(server.count(), 0);
    run.config.budget.usd = Some(0.01);
    let summary = run.harvest().await;
    assert_eq!(summary.ok, 2);
    let table = summary.to_table();
    assert!(table.contains("of the budget of $0.0100"), "{table}");
    assert!(run.config.run_dir.join("summary.json").exists());
}
