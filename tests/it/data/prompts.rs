//! Training and generation use the same prompt.

use std::collections::BTreeMap;

use distill::cache::record::{Record, Timing};
use distill::config::{Config, TemplateDate, Thinking};
use distill::data::dataset;
use distill::data::groups::Selection;
use distill::data::report::DataReport;
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use distill::tokenizer::chat_template::TemplateClock;
use serde_json::json;
use tempfile::TempDir;

use super::align::{align, logprobs, same_tokenizer};
use super::dataset::{load, record, write_cache};
use super::{ask, folder, message};
use crate::tiny;

/// Like Qwen 3's: an empty thinking block before the last answer.
const EMPTY_BLOCK: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
/// Like R1's: only the generation prompt opens a thinking block.
const OPENED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
/// Like Mistral Nemo's: the system message is part of the last user message.
const MOVED: &str = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.last or (loop.index == messages | length - 1) %}{{ messages[0].content }} {% endif %}{{ m.content }}<|im_end|>{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}";
/// Like Qwen 3's: reformats the thinking of the last answer, and drops that of other answers.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}{% if loop.last %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Drops the thinking of every answer.
const DROPPED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// The generation prompt begins differently from the conversation.
const DATED: &str = "{% if add_generation_prompt %}Today. {% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn with_template(template: &str) -> (TempDir, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder("bytelevel").join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    (dir, tokenizer)
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|id| tokenizer.spelling(*id).unwrap().into_owned())
        .collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn supervised_answers_follow_their_generation_prompt() {
    let mut several = vec![message("system", "Be kind.")];
    several.extend(ask("Hello", "Hi."));
    several.extend(ask("And now?", "<think>\nHm, what?\n</think>\n\nBye."));
    let conversations: [Vec<Message>; 2] = [ask("Who?", "Me."), several];
    // Template, and the last supervised text of each conversation.
    for (template, last) in [
        (
            EMPTY_BLOCK,
            [
                "<think>\n\n</think>\n\nMe.<|im_end|>",
                "<think>\n\n</think>\n\n<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            OPENED,
            ["Me.<|im_end|>", "Hm, what?\n</think>\n\nBye.<|im_end|>"],
        ),
        (
            DROPPED,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            DATED,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            MOVED,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            THINKING,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
    ] {
        let (_dir, tokenizer) = with_template(template);
        for (messages, last) in conversations.iter().zip(last) {
            let conversation = tokenizer.conversation(messages).unwrap();
            for answer in &conversation.answers {
                let prompt = tokenizer
                    .encode_prompt(&messages[..answer.message])
                    .unwrap();
                if answer.follows_generation_prompt {
                    let before = &conversation.ids[..answer.supervised.start];
                    assert_eq!(before, prompt, "{template}: {}", text(&tokenizer, before));
                }
            }
            let answer = conversation.answers.last().unwrap();
            assert!(answer.follows_generation_prompt, "{template}");
            let supervised = &conversation.ids[answer.supervised.clone()];
            assert_eq!(text(&tokenizer, supervised), last, "{template}");
            let content = &messages[answer.message].content;
            assert!(
                content[answer.text.clone()].ends_with(if messages.len() == 2 {
                    "Me."
                } else {
                    "Bye."
                })
            );
            let answer_ids = &conversation.ids[answer.after_thinking..answer.tokens.end];
            if messages.len() > 2 {
                assert_eq!(text(&tokenizer, answer_ids).trim(), "Bye.", "{template}");
            }
        }
    }
}

#[test]
fn differing_prompt_endings_are_reported() {
    let (_dir, tokenizer) = with_template(OPENED);
    let conversation = tokenizer.conversation(&ask("Who?", "Me.")).unwrap();
    let difference = conversation.difference.unwrap();
    assert!(
        difference.generation.ends_with("assistant\n<think>\n"),
        "{difference:?}"
    );
    assert!(
        difference.conversation.ends_with("assistant\n"),
        "{difference:?}"
    );
    let (_dir, tokenizer) = with_template(EMPTY_BLOCK);
    let conversation = tokenizer.conversation(&ask("Who?", "Me.")).unwrap();
    assert_eq!(conversation.difference, None);
}

#[test]
fn end_of_turn_token_is_a_stop_id() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder("bytelevel").join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    // The eos token of a base model.
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": 0}"#,
    )
    .unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().stop_ids(), [0, 2]);
    let endless = template.replace("<|im_end|>", "");
    std::fs::write(dir.path().join("chat_template.jinja"), endless).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().stop_ids(), [0]);
}

/// Supervised texts of each example, by its key.
fn examples(
    template: &str,
    rows: &[Vec<Message>],
    set: impl Fn(&mut Config),
) -> (DataReport, BTreeMap<String, Vec<String>>) {
    let (dir, tokenizer) = with_template(template);
    let source = dir.path().join("rows.jsonl");
    let lines = rows
        .iter()
        .map(|messages| json!({"messages": messages}).to_string());
    std::fs::write(&source, lines.collect::<Vec<_>>().join("\n")).unwrap();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(source);
    config.data.validation_share = 0.0;
    set(&mut config);
    let data = load(&config, &tokenizer).unwrap();
    let prompts = dataset::prompts(&config.data, &config.run_dir, &Selection::All).unwrap();
    let mut found = BTreeMap::new();
    for example in data.train().iter() {
        assert!(prompts.contains_key(example.key()), "{}", example.key());
        let ids: Vec<u32> = example.input_ids().collect();
        let mut spans: Vec<Vec<u32>> = Vec::new();
        let mut before = None;
        for position in example.positions() {
            if before != Some(position) {
                spans.push(Vec::new());
            }
            spans.last_mut().unwrap().push(ids[position as usize + 1]);
            before = Some(position + 1);
        }
        let texts = spans.iter().map(|ids| text(&tokenizer, ids)).collect();
        found.insert(example.key().to_owned(), texts);
    }
    (data.report.clone(), found)
}

#[test]
fn answers_with_another_prefix_become_separate_examples() {
    let mut several = ask("Hello", "Hi.");
    several.extend(ask("And now?", "Bye."));
    let (report, found) = examples(OPENED, &[several.clone()], |_| {});
    assert_eq!((report.records, report.kept, report.split), (1, 2, 1));
    assert_eq!(
        (report.prefix_differs, report.answers, report.without_end),
        (2, 2, 0)
    );
    assert_eq!(found["1"], ["Bye.<|im_end|>"]);
    assert_eq!(found["1:1"], ["Hi.<|im_end|>"]);
    let shown = report.to_string();
    assert!(
        shown.contains("assistant\\n<think>\\n") && shown.contains("separate examples"),
        "{shown}"
    );
    // The last message of a conversation has a thinking block, so each answer is trained as the last one.
    let (report, found) = examples(EMPTY_BLOCK, &[several.clone()], |_| {});
    assert_eq!(
        (report.kept, report.split, report.prefix_differs),
        (2, 1, 0)
    );
    assert_eq!(found["1"], ["<think>\n\n</think>\n\nBye.<|im_end|>"]);
    assert_eq!(found["1:1"], ["<think>\n\n</think>\n\nHi.<|im_end|>"]);
    // Without a difference, one example contains all answers.
    let (report, found) = examples(CHATML, &[several.clone()], |_| {});
    assert_eq!((report.records, report.kept, report.split), (1, 1, 0));
    assert_eq!((report.answers, report.without_end), (2, 0));
    assert_eq!(found["1"], ["Hi.<|im_end|>", "Bye.<|im_end|>"]);
    // A conversation whose last answer is too long is dropped as a whole.
    let rows = [ask("Hello", "Hi."), several];
    let (report, _) = examples(OPENED, &rows, |config| config.data.max_length = 40);
    let dropped: u64 = report.dropped.values().sum();
    assert_eq!(
        (report.records, report.kept, report.split, dropped),
        (2, 1, 0, 1)
    );
}

/// The tokenizer makes one token from the end of the template text and the leading white space of an answer.
#[test]
fn prompts_of_later_answers_equal_generation_prompts() {
    let mut messages = ask("Hello", "   Hi.");
    messages.extend(ask("And now?", "Bye."));
    let (_dir, tokenizer) = with_template(CHATML);
    let conversation = tokenizer.conversation(&messages).unwrap();
    let last = conversation.answers.last().unwrap();
    let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
    assert_eq!(conversation.ids[..last.tokens.start], prompt);
    let (report, found) = examples(CHATML, &[messages], |_| {});
    assert_eq!((report.kept, report.split, report.answers), (2, 1, 2));
    assert_eq!(found["1"], ["Bye.<|im_end|>"]);
    assert_eq!(found["1:1"], ["   Hi.<|im_end|>"]);
}

/// Same with text of the template directly after the answer, without a control token between them.
#[test]
fn answers_merging_with_template_text_become_separate_examples() {
    const FOLLOWED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}   <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_dir, tokenizer) = with_template(FOLLOWED);
    for (answer, separate) in [("Hi.\n", 1), ("Hi.", 0)] {
        let mut messages = ask("Hello", answer);
        messages.extend(ask("And now?", "Bye."));
        let conversation = tokenizer.conversation(&messages).unwrap();
        let last = conversation.answers.last().unwrap();
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        assert_eq!(conversation.ids[..last.tokens.start], prompt, "{answer:?}");
        let (report, _) = examples(FOLLOWED, &[messages], |_| {});
        assert_eq!(report.split, separate, "{answer:?}");
    }
}

/// Runs of one character are split by their length.
#[test]
fn long_runs_before_template_text_are_compared_whole() {
    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let dir = tempfile::tempdir().unwrap();
    tiny::write_tokenizer(dir.path(), 0..=255, &[("-", "-"), ("-", "Ċ")]);
    let path = dir.path().join("tokenizer.json");
    let source = std::fs::read_to_string(&path).unwrap();
    let whole = source.replace(r#""use_regex":true"#, r#""use_regex":false"#);
    assert_ne!(source, whole);
    std::fs::write(&path, whole).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let dashes = |count: usize| {
        let mut messages = ask("Hello", &"-".repeat(count));
        messages.extend(ask("And now?", "Bye."));
        messages
    };
    for (count, follows) in [(64, true), (65, false), (66, true), (129, false)] {
        let messages = dashes(count);
        let conversation = tokenizer.conversation(&messages).unwrap();
        let start = conversation.answers[1].tokens.start;
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        assert_eq!(conversation.ids[..start], prompt, "{count}");
        let first = &conversation.answers[0];
        assert_eq!(first.follows_generation_prompt, follows, "{count}");
    }
}

/// Templates such as Llama 2's write text between an answer and the end of its turn.
#[test]
fn answer_ends_at_the_first_template_text_of_the_end_of_turn() {
    const LATER: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_dir, tokenizer) = with_template(LATER);
    let newline = tokenizer.encode_text("\n").unwrap()[0];
    let end = tokenizer.id_of_control("<|im_end|>");
    assert_eq!(
        (tokenizer.end_of_answer(), tokenizer.end_of_turn()),
        (Some(newline), end)
    );
    let letter = tokenizer.encode_text("T").unwrap()[0];
    let listed = (
        "<|im_end|>",
        -0.5,
        &[("<|im_end|>", Some(-0.5)), ("a", Some(-1.0))][..],
    );
    let text = ("T", -0.1, &[("T", Some(-0.1)), ("</s>", Some(-3.0))][..]);
    let of = |rows: &[_]| align(&tokenizer, &logprobs(rows), "T", &[letter, newline]).unwrap();
    let aligned = of(&[text, listed]);
    assert_eq!(aligned.lists_end, Some(true));
    assert_eq!(aligned.soft(0), (&[letter, newline][..], &[-0.1, -3.0][..]));
    let other = tokenizer.encode_text("a").unwrap()[0];
    assert_eq!(aligned.soft(1), (&[newline, other][..], &[-0.5, -1.0][..]));
    assert_eq!(of(&[text]).lists_end, Some(false));
    // The same token may be part of the answer.
    let teacher = logprobs(&[("T", -0.1, &[]), ("\n", -0.1, &[]), listed]);
    let aligned = align(&tokenizer, &teacher, "T\n", &[letter, newline, newline]).unwrap();
    assert_eq!((aligned.len(), aligned.lists_end), (3, Some(true)));
    let aligned = align(&tokenizer, &teacher, "T\n", &[letter, newline]).unwrap();
    assert_eq!((aligned.len(), aligned.lists_end), (2, None));
}

/// A token that begins the next turn would not stop a model.
#[test]
fn control_tokens_that_are_not_stop_tokens_do_not_end_turns() {
    const ENDLESS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let mut messages = ask("Hello", "Hi.");
    messages.extend(ask("And now?", "Bye."));
    let (report, found) = examples(ENDLESS, &[messages], |_| {});
    assert_eq!(found["1"], ["Hi.", "Bye."]);
    assert_eq!((report.answers, report.without_end), (2, 2));
}

#[test]
fn messages_after_the_last_answer_are_ignored() {
    let answer = ask("Hello", "Hi.");
    let mut followed = answer.clone();
    followed.push(message("user", "And now?"));
    let (_, found) = examples(EMPTY_BLOCK, &[answer, followed], |_| {});
    assert_eq!(found["1"], ["<think>\n\n</think>\n\nHi.<|im_end|>"]);
    assert_eq!(found["2"], found["1"]);
}

#[test]
fn thinking_only_answer_is_dropped_after_a_prompt_that_closes_thinking() {
    const CLOSED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}";
    let rows = [
        ask("Who?", "<think>\nHm.\n</think>\n\n"),
        ask("Who?", "Me."),
    ];
    let (report, found) = examples(CLOSED, &rows, |_| {});
    assert_eq!(report.dropped["the answer is empty"], 1);
    assert_eq!(found["2"], ["Me.<|im_end|>"]);
}

#[test]
fn thinking_setting_supervises_masks_or_drops_thinking() {
    let rows = [ask("Who?", "<think>\nHm.\n</think>\n\nMe.")];
    let of = |thinking| {
        let (report, found) = examples(THINKING, &rows, |config| config.data.thinking = thinking);
        (found["1"].clone(), report.tokens)
    };
    let (learnt, all) = of(Thinking::Supervise);
    assert_eq!(learnt, ["<think>\nHm.\n</think>\n\nMe.<|im_end|>"]);
    assert_eq!(of(Thinking::Context), (vec!["Me.<|im_end|>".into()], all));
    let (learnt, tokens) = of(Thinking::Drop);
    assert_eq!(learnt, ["Me.<|im_end|>"]);
    assert!(tokens < all, "{tokens} of {all}");
}

#[test]
fn answers_without_end_of_turn_token_are_counted() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let (report, found) = examples(template, &[ask("Who?", "Me.")], |_| {});
    assert_eq!((report.answers, report.without_end), (1, 1));
    assert_eq!(found["1"], ["Me."]);
    assert!(
        report
            .to_string()
            .contains("1 of 1 answers have no end-of-turn token")
    );
}

/// The generation prompt closes a block of thinking, so the answer cannot contain another one.
#[test]
fn thinking_is_left_out_after_a_prompt_that_closes_thinking() {
    let template = THINKING.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    );
    let rows = [ask("Who?", "<think>\nHm.\n</think>\n\nMe.")];
    let (report, found) = examples(&template, &rows, |_| {});
    assert_eq!(found["1"], ["Me.<|im_end|>"]);
    let shown = report.to_string();
    assert!(
        shown.contains("answers in training: 1 without their thinking"),
        "{shown}"
    );
}

#[test]
fn thinking_dropped_by_the_template_is_restored() {
    let mut several = ask("Hello", "<think>\nA.\n</think>\n\nHi.");
    several.extend(ask("And now?", "<think>B.</think>Bye."));
    let of = |template, thinking| {
        examples(template, &[several.clone()], |config| {
            config.data.thinking = thinking
        })
    };
    // Template, and the supervised texts of the two answers.
    for (template, first, last) in [
        (
            DROPPED,
            "<think>\nA.\n</think>\n\nHi.<|im_end|>",
            "<think>B.</think>Bye.<|im_end|>",
        ),
        (
            OPENED,
            "A.\n</think>\n\nHi.<|im_end|>",
            "B.</think>Bye.<|im_end|>",
        ),
    ] {
        let (report, found) = of(template, Thinking::Supervise);
        assert_eq!(found["1"], [last], "{template}");
        assert_eq!(found["1:1"], [first], "{template}");
        let shown = report.to_string();
        assert!(
            shown.contains(
                "answers in training: 2 with their thinking, which the chat template drops"
            ),
            "{shown}"
        );
        let (_, found) = of(template, Thinking::Context);
        assert_eq!(found["1"], ["Bye.<|im_end|>"], "{template}");
        assert_eq!(found["1:1"], ["Hi.<|im_end|>"], "{template}");
        let (report, found) = of(template, Thinking::Drop);
        assert_eq!(found["1"].last().unwrap(), "Bye.<|im_end|>", "{template}");
        assert!(report.thinking.is_empty());
    }
}

#[test]
fn answers_printed_twice_or_out_of_order_are_not_confused() {
    let first =
        "{% if messages[-1].role == 'assistant' %}Last: {{ messages[-1].content }}\n{% endif %}";
    let (_, found) = examples(
        &format!("{first}{CHATML}"),
        &[ask("Say yes", "yes")],
        |_| {},
    );
    assert_eq!(found["1"], ["yes<|im_end|>"]);
    let reversed = CHATML.replace("in messages %}", "in messages | reverse %}");
    let (_dir, tokenizer) = with_template(&reversed);
    let mut several = ask("Hello", "Hi.");
    several.extend(ask("And now?", "Bye."));
    let error = tokenizer.conversation(&several).unwrap_err().to_string();
    assert!(error.contains("in another order"), "{error}");
}

#[test]
fn prompt_difference_is_shown_after_the_shared_messages() {
    let long = "a question ".repeat(20);
    for template in [OPENED, MOVED] {
        let (_dir, tokenizer) = with_template(template);
        let mut messages = vec![message("system", "Be kind.")];
        messages.extend(ask(&long, "Hi."));
        messages.extend(ask(&long, "Bye."));
        let conversation = tokenizer.conversation(&messages).unwrap();
        if let Some(difference) = conversation.difference {
            assert_ne!(difference.generation, difference.conversation, "{template}");
        }
    }
    let (_dir, tokenizer) = with_template(OPENED);
    let difference = tokenizer
        .conversation(&ask(&long, "Hi."))
        .unwrap()
        .difference
        .unwrap();
    assert_eq!(
        difference.generation,
        "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    );
    assert_eq!(
        difference.conversation,
        "<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn template_without_its_date_is_a_usage_error() {
    let template = CHATML.replace(
        "{% for",
        "{% if messages | length > 2 %}{{ strftime_now('%Y') }}{% endif %}{% for",
    );
    let (dir, tokenizer) = with_template(&template);
    let mut several = ask("Hello", "Hi.");
    several.extend(ask("And now?", "Bye."));
    let rows =
        [ask("Hello", "Hi."), several].map(|messages| json!({"messages": messages}).to_string());
    let source = dir.path().join("rows.jsonl");
    std::fs::write(&source, rows.join("\n")).unwrap();
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

/// With logprobs and without, which are read by different parsers.
#[test]
fn template_date_record_is_the_date_of_the_request() {
    let template = CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}\n{% for");
    let (dir, _) = with_template(&template);
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
    let begins = |config: &Config| {
        let tokenizer = Tokenizer::for_student(&config.student).unwrap();
        let data = load(config, &tokenizer).unwrap();
        let begin = |ids: Vec<u32>| text(&tokenizer, &ids)[..11].to_owned();
        let examples = data.train().iter();
        let begins = examples.map(|example| begin(example.input_ids().collect()));
        begins.collect::<Vec<_>>()
    };
    config.student.template_date = Some(TemplateDate::Record);
    assert_eq!(begins(&config), ["28 Feb 2026", "01 Mar 2026"]);
    // Another date gives another dataset, also for `distill eval`, which sets the date later.
    let fingerprint = |date: TemplateClock| {
        let mut tokenizer = Tokenizer::load(dir.path()).unwrap();
        tokenizer.set_date(date);
        tokenizer.fingerprint()
    };
    let trained = Tokenizer::for_student(&config.student).unwrap();
    assert_eq!(fingerprint(TemplateClock::Record), trained.fingerprint());
    let other = TemplateDate::try_from("2026-01-31".to_owned()).unwrap();
    assert_ne!(
        fingerprint(TemplateClock::Record),
        fingerprint(other.into())
    );
    config.student.template_date = Some("2026-01-31".to_owned().try_into().unwrap());
    assert_eq!(begins(&config), ["31 Jan 2026", "31 Jan 2026"]);
}

/// A block of thinking may lack its opening tag, if the teacher's prompt ends with it, or its closing tag, if it was
/// truncated.
#[test]
fn thinking_without_one_of_its_tags_is_found() {
    let of = |template: &str, answer: &str, thinking| {
        examples(template, &[ask("Who?", answer)], |config| {
            config.data.thinking = thinking
        })
    };
    let closed = "Hm.\n</think>\n\nMe.";
    // Template, and the supervised text.
    for (template, learnt) in [
        (OPENED, "Hm.\n</think>\n\nMe.<|im_end|>"),
        (THINKING, "<think>\nHm.\n</think>\n\nMe.<|im_end|>"),
        (CHATML, "Hm.\n</think>\n\nMe.<|im_end|>"),
    ] {
        let (_, found) = of(template, closed, Thinking::Supervise);
        assert_eq!(found["1"], [learnt], "{template}");
        for thinking in [Thinking::Context, Thinking::Drop] {
            let (_, found) = of(template, closed, thinking);
            assert_eq!(found["1"], ["Me.<|im_end|>"], "{template}, {thinking:?}");
        }
    }
    let (_, found) = of(OPENED, "<think>\nHm", Thinking::Supervise);
    assert_eq!(found["1"], ["Hm<|im_end|>"]);
    let (_, found) = of(CHATML, "<think>\nHm", Thinking::Supervise);
    assert_eq!(found["1"], ["<think>\nHm<|im_end|>"]);
    // A text that mentions the tag.
    let answer = "The tag </think> ends it.";
    let (_, found) = of(CHATML, answer, Thinking::Drop);
    assert_eq!(found["1"], [format!("{answer}<|im_end|>")]);
}

#[test]
fn thinking_only_answer_is_empty_if_thinking_is_not_trained() {
    let closing = THINKING.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    );
    for (template, answer, thinking) in [
        (
            closing.as_str(),
            "<think>\nHm.\n</think>",
            Thinking::Supervise,
        ),
        (closing.as_str(), "<think>\nHm.", Thinking::Supervise),
        (CHATML, "<think>\nHm.", Thinking::Drop),
        (CHATML, "<think>\nHm.", Thinking::Context),
    ] {
        let (report, found) = examples(
            template,
            &[ask("Who?", answer), ask("Who?", "Me.")],
            |config| config.data.thinking = thinking,
        );
        assert_eq!(found.len(), 1, "{answer}, {thinking:?}: {found:?}");
        let dropped: Vec<_> = report.dropped.keys().collect();
        assert_eq!(dropped, ["the answer is empty"], "{answer}, {thinking:?}");
    }
}

/// Fields that would change what is trained are used or refused, not ignored.
#[test]
fn rows_with_unsupported_fields_are_refused_by_name() {
    let (dir, tokenizer) = with_template(CHATML);
    let source = dir.path().join("rows.jsonl");
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(source.clone());
    config.data.validation_share = 0.0;
    let question = json!({"role": "user", "content": "Who?"});
    for (field, value) in [
        ("reasoning_content", json!("Hm.")),
        ("reasoning", json!("Hm.")),
        ("reasoning_details", json!([{"text": "Hm."}])),
        ("thinking", json!("Hm.")),
        ("thought", json!("Hm.")),
        ("tool_calls", json!([{"id": "1"}])),
        ("function_call", json!({"name": "f"})),
        ("functions", json!([{"name": "f"}])),
        ("tools", json!([{"type": "function"}])),
        ("weight", json!(0)),
    ] {
        let is_reasoning = value.is_string() || field == "reasoning_details";
        for is_of_row in [false, true] {
            // In rows of some datasets, such a field is a flag for reasoning.
            if is_of_row && is_reasoning {
                continue;
            }
            let mut answer = json!({"role": "assistant", "content": "Me."});
            let mut row = json!({"messages": []});
            if is_of_row {
                row[field] = value.clone();
            } else {
                answer[field] = value.clone();
            }
            row["messages"] = json!([question, answer]);
            std::fs::write(&source, row.to_string()).unwrap();
            let error = format!("{:#}", load(&config, &tokenizer).unwrap_err());
            assert!(
                error.contains(":1: ") && error.contains(field) && error.contains("not supported"),
                "{field}: {error}"
            );
        }
    }
    let answer = json!({"role": "assistant", "content": "Me.", "weight": 1, "tool_calls": null});
    let row = json!({"messages": [question, answer], "tools": [], "other": 1, "reasoning": "off"});
    std::fs::write(&source, row.to_string()).unwrap();
    assert_eq!(load(&config, &tokenizer).unwrap().report.kept, 1);
}
