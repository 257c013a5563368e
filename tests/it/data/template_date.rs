//! Chat templates that contain the date.

use distill::cache::record::{Record, Timing};
use distill::config::{Config, TemplateDate};
use distill::tokenizer::Tokenizer;
use distill::tokenizer::chat_template::TemplateClock;

use super::align::same_tokenizer;
use super::ask;
use super::dataset::{load, record, write_cache};
use super::templates::{CHATML, rows, spell, tokenizer_with_template, two_turns};

#[test]
fn missing_template_date_is_a_usage_error() {
    let template = CHATML.replace(
        "{% for",
        "{% if messages | length > 2 %}{{ strftime_now('%Y') }}{% endif %}{% for",
    );
    let (dir, tokenizer) = tokenizer_with_template(&template);
    let conversations = [ask("Hello", "Hi."), two_turns("Hi.", "Bye.")];
    let source = dir.path().join("rows.jsonl");
    std::fs::write(&source, rows(&conversations)).unwrap();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(source);
    let error = load(&config, &tokenizer).unwrap_err();
    assert!(
        error.to_string().contains("student.template_date"),
        "{error:#}"
    );
    assert_eq!(distill::exit::Exit::code_of(&error), 2);
}

/// Different parsers read records with and without logprobs, so one record has them.
#[test]
fn template_date_record_is_the_date_of_the_request() {
    let template = CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}\n{% for");
    let (dir, _) = tokenizer_with_template(&template);
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.student.path = dir.path().to_owned();
    config.data.validation_share = 0.0;
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let ids = tokenizer.encode_text("Me.").unwrap();
    let dated = |prompt: &str, sent_at: &str| Record {
        timing: Timing {
            sent_at: sent_at.into(),
            ..Timing::default()
        },
        ..record(prompt, "Me.")
    };
    let with_logprobs = Record {
        logprobs: Some(same_tokenizer(&tokenizer, &ids, 5).0),
        ..dated("a", "2026-02-28T23:59:59.999Z")
    };
    let records = [with_logprobs, dated("b", "2026-03-01T00:00:00.000Z")];
    write_cache(&config.training_cache(), &records);
    let dates_in_examples = |config: &Config| -> Vec<String> {
        let tokenizer = Tokenizer::for_student(&config.student).unwrap();
        let data = load(config, &tokenizer).unwrap();
        let date_length = "28 Feb 2026".len();
        let examples = data.train().iter();
        let ids = examples.map(|example| example.input_ids().collect::<Vec<u32>>());
        ids.map(|ids| spell(&tokenizer, &ids)[..date_length].to_owned())
            .collect()
    };
    config.student.template_date = Some(TemplateDate::Record);
    assert_eq!(dates_in_examples(&config), ["28 Feb 2026", "01 Mar 2026"]);
    // The date is a part of the fingerprint, also if it is set after loading, as by `distill eval`.
    let fingerprint = |date: TemplateClock| {
        let mut tokenizer = Tokenizer::load(dir.path()).unwrap();
        tokenizer.set_date(date);
        tokenizer.fingerprint()
    };
    let trained = Tokenizer::for_student(&config.student).unwrap();
    assert_eq!(fingerprint(TemplateClock::Record), trained.fingerprint());
    let fixed = || TemplateDate::try_from("2026-01-31".to_owned()).unwrap();
    assert_ne!(
        fingerprint(TemplateClock::Record),
        fingerprint(fixed().into())
    );
    config.student.template_date = Some(fixed());
    assert_eq!(dates_in_examples(&config), ["31 Jan 2026", "31 Jan 2026"]);
}
