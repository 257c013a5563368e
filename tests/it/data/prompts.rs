//! Training and generation use the same prompt.

use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;

use super::templates::{
    CHATML, DATED_PROMPT, DROPS_THINKING, EMPTY_THINKING_BLOCK, KEEPS_LAST_THINKING,
    OPENS_THINKING, SYSTEM_IN_LAST_USER, prepare, spell, tokenizer_with_template, two_turns,
};
use super::{ask, message};
use crate::tiny;

#[test]
fn supervised_answers_follow_their_generation_prompt() {
    let mut with_system = vec![message("system", "Be kind.")];
    with_system.extend(two_turns("Hi.", "<think>\nHm, what?\n</think>\n\nBye."));
    let conversations: [Vec<Message>; 2] = [ask("Who?", "Me."), with_system];
    // Template, and the last supervised text of each conversation.
    for (template, last) in [
        (
            EMPTY_THINKING_BLOCK,
            [
                "<think>\n\n</think>\n\nMe.<|im_end|>",
                "<think>\n\n</think>\n\n<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            OPENS_THINKING,
            ["Me.<|im_end|>", "Hm, what?\n</think>\n\nBye.<|im_end|>"],
        ),
        (
            DROPS_THINKING,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            DATED_PROMPT,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            SYSTEM_IN_LAST_USER,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (
            KEEPS_LAST_THINKING,
            [
                "Me.<|im_end|>",
                "<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
    ] {
        let (_dir, tokenizer) = tokenizer_with_template(template);
        for (messages, last) in conversations.iter().zip(last) {
            let conversation = tokenizer.conversation(messages).unwrap();
            for answer in &conversation.answers {
                let prompt = tokenizer
                    .encode_prompt(&messages[..answer.message])
                    .unwrap();
                if answer.follows_generation_prompt {
                    let before = &conversation.ids[..answer.supervised.start];
                    assert_eq!(before, prompt, "{template}: {}", spell(&tokenizer, before));
                }
            }
            let answer = conversation.answers.last().unwrap();
            assert!(answer.follows_generation_prompt, "{template}");
            let supervised = &conversation.ids[answer.supervised.clone()];
            assert_eq!(spell(&tokenizer, supervised), last, "{template}");
            let is_first = messages.len() == 2;
            let content = &messages[answer.message].content;
            let end = if is_first { "Me." } else { "Bye." };
            assert!(content[answer.text.clone()].ends_with(end), "{template}");
            if !is_first {
                let ids = &conversation.ids[answer.after_thinking..answer.tokens.end];
                assert_eq!(spell(&tokenizer, ids).trim(), "Bye.", "{template}");
            }
        }
    }
}

#[test]
fn differing_prompt_endings_are_reported() {
    let (_dir, tokenizer) = tokenizer_with_template(OPENS_THINKING);
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
    let (_dir, tokenizer) = tokenizer_with_template(EMPTY_THINKING_BLOCK);
    let conversation = tokenizer.conversation(&ask("Who?", "Me.")).unwrap();
    assert_eq!(conversation.difference, None);
}

#[test]
fn answers_with_another_prefix_become_separate_examples() {
    let conversations = [two_turns("Hi.", "Bye.")];
    let (report, texts) = prepare(OPENS_THINKING, &conversations, |_| {});
    assert_eq!((report.records, report.kept, report.split), (1, 2, 1));
    assert_eq!(
        (report.prefix_differs, report.answers, report.without_end),
        (2, 2, 0)
    );
    assert_eq!(texts["1"], ["Bye.<|im_end|>"]);
    assert_eq!(texts["1:1"], ["Hi.<|im_end|>"]);
    let shown = report.to_string();
    assert!(
        shown.contains("assistant\\n<think>\\n") && shown.contains("separate examples"),
        "{shown}"
    );
    // Only the last answer of a conversation gets a thinking block, so each answer is trained as a last one.
    let (report, texts) = prepare(EMPTY_THINKING_BLOCK, &conversations, |_| {});
    assert_eq!(
        (report.kept, report.split, report.prefix_differs),
        (2, 1, 0)
    );
    assert_eq!(texts["1"], ["<think>\n\n</think>\n\nBye.<|im_end|>"]);
    assert_eq!(texts["1:1"], ["<think>\n\n</think>\n\nHi.<|im_end|>"]);
    // Without a difference, one example contains all answers.
    let (report, texts) = prepare(CHATML, &conversations, |_| {});
    assert_eq!((report.records, report.kept, report.split), (1, 1, 0));
    assert_eq!((report.answers, report.without_end), (2, 0));
    assert_eq!(texts["1"], ["Hi.<|im_end|>", "Bye.<|im_end|>"]);
    // A conversation whose last answer is too long is dropped as a whole.
    let conversations = [ask("Hello", "Hi."), two_turns("Hi.", "Bye.")];
    let (report, _) = prepare(OPENS_THINKING, &conversations, |config| {
        config.data.max_length = 40
    });
    let dropped: u64 = report.dropped.values().sum();
    assert_eq!(
        (report.records, report.kept, report.split, dropped),
        (2, 1, 0, 1)
    );
}

/// In the whole conversation, the tokenizer would join the line feed of the template and the white space of the answer.
#[test]
fn prompts_of_later_answers_equal_generation_prompts() {
    let messages = two_turns("   Hi.", "Bye.");
    let (_dir, tokenizer) = tokenizer_with_template(CHATML);
    let conversation = tokenizer.conversation(&messages).unwrap();
    let last = conversation.answers.last().unwrap();
    let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
    assert_eq!(conversation.ids[..last.tokens.start], prompt);
    let (report, texts) = prepare(CHATML, &[messages], |_| {});
    assert_eq!((report.kept, report.split, report.answers), (2, 1, 2));
    assert_eq!(texts["1"], ["Bye.<|im_end|>"]);
    assert_eq!(texts["1:1"], ["   Hi.<|im_end|>"]);
}

/// The template writes text directly after the answer, and the tokenizer may join both.
#[test]
fn answers_merging_with_template_text_become_separate_examples() {
    const SPACES_AFTER_ANSWER: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}   <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_dir, tokenizer) = tokenizer_with_template(SPACES_AFTER_ANSWER);
    for (answer, separate) in [("Hi.\n", 1), ("Hi.", 0)] {
        let messages = two_turns(answer, "Bye.");
        let conversation = tokenizer.conversation(&messages).unwrap();
        let last = conversation.answers.last().unwrap();
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        assert_eq!(conversation.ids[..last.tokens.start], prompt, "{answer:?}");
        let (report, _) = prepare(SPACES_AFTER_ANSWER, &[messages], |_| {});
        assert_eq!(report.split, separate, "{answer:?}");
    }
}

/// This tokenizer joins hyphens in pairs, from the start of a run. If their number is odd, the last one joins the line
/// feed of the template.
#[test]
fn long_runs_before_template_text_are_compared_whole() {
    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let dir = tempfile::tempdir().unwrap();
    tiny::write_tokenizer(dir.path(), 0..=255, &[("-", "-"), ("-", "Ċ")]);
    let path = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let without_regex = text.replace(r#""use_regex":true"#, r#""use_regex":false"#);
    assert_ne!(text, without_regex);
    std::fs::write(&path, without_regex).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    for (count, follows) in [(64, true), (65, false), (66, true), (129, false)] {
        let messages = two_turns(&"-".repeat(count), "Bye.");
        let conversation = tokenizer.conversation(&messages).unwrap();
        let start = conversation.answers[1].tokens.start;
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        assert_eq!(conversation.ids[..start], prompt, "{count}");
        let first = &conversation.answers[0];
        assert_eq!(first.follows_generation_prompt, follows, "{count}");
    }
}

#[test]
fn messages_after_the_last_answer_are_ignored() {
    let answer = ask("Hello", "Hi.");
    let mut followed = answer.clone();
    followed.push(message("user", "And now?"));
    let (_, texts) = prepare(EMPTY_THINKING_BLOCK, &[answer, followed], |_| {});
    assert_eq!(texts["1"], ["<think>\n\n</think>\n\nHi.<|im_end|>"]);
    assert_eq!(texts["2"], texts["1"]);
}

#[test]
fn answers_printed_twice_or_out_of_order_are_not_confused() {
    let last_answer_first =
        "{% if messages[-1].role == 'assistant' %}Last: {{ messages[-1].content }}\n{% endif %}";
    let (_, texts) = prepare(
        &format!("{last_answer_first}{CHATML}"),
        &[ask("Say yes", "yes")],
        |_| {},
    );
    assert_eq!(texts["1"], ["yes<|im_end|>"]);
    let reversed = CHATML.replace("in messages %}", "in messages | reverse %}");
    let (_dir, tokenizer) = tokenizer_with_template(&reversed);
    let error = tokenizer
        .conversation(&two_turns("Hi.", "Bye."))
        .unwrap_err()
        .to_string();
    assert!(error.contains("in another order"), "{error}");
}

#[test]
fn prompt_difference_is_shown_after_the_shared_messages() {
    let long = "a question ".repeat(20);
    for template in [OPENS_THINKING, SYSTEM_IN_LAST_USER] {
        let (_dir, tokenizer) = tokenizer_with_template(template);
        let mut messages = vec![message("system", "Be kind.")];
        messages.extend(ask(&long, "Hi."));
        messages.extend(ask(&long, "Bye."));
        let conversation = tokenizer.conversation(&messages).unwrap();
        if let Some(difference) = conversation.difference {
            assert_ne!(difference.generation, difference.conversation, "{template}");
        }
    }
    let (_dir, tokenizer) = tokenizer_with_template(OPENS_THINKING);
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
