//! Thinking in answers: supervised, masked or dropped, depending on the setting and the chat template.

use distill::config::Thinking;

use super::ask;
use super::templates::{
    CHATML, DROPS_THINKING, KEEPS_LAST_THINKING, OPENS_THINKING, prepare, two_turns,
};

/// Returns [`KEEPS_LAST_THINKING`] with an empty thinking block at the end of its generation prompt.
fn template_that_closes_thinking() -> String {
    KEEPS_LAST_THINKING.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    )
}

#[test]
fn thinking_only_answer_is_dropped_after_a_prompt_that_closes_thinking() {
    const CLOSES_THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}";
    let rows = [
        ask("Who?", "<think>\nHm.\n</think>\n\n"),
        ask("Who?", "Me."),
    ];
    let (report, texts) = prepare(CLOSES_THINKING, &rows, |_| {});
    assert_eq!(report.dropped["the answer is empty"], 1);
    assert_eq!(texts["2"], ["Me.<|im_end|>"]);
}

#[test]
fn thinking_setting_supervises_masks_or_drops_thinking() {
    let rows = [ask("Who?", "<think>\nHm.\n</think>\n\nMe.")];
    let texts_and_tokens = |thinking| {
        let (report, texts) = prepare(KEEPS_LAST_THINKING, &rows, |config| {
            config.data.thinking = thinking
        });
        (texts["1"].clone(), report.tokens)
    };
    let (texts, all_tokens) = texts_and_tokens(Thinking::Supervise);
    assert_eq!(texts, ["<think>\nHm.\n</think>\n\nMe.<|im_end|>"]);
    let (texts, tokens) = texts_and_tokens(Thinking::Context);
    assert_eq!(texts, ["Me.<|im_end|>"]);
    assert_eq!(tokens, all_tokens);
    let (texts, tokens) = texts_and_tokens(Thinking::Drop);
    assert_eq!(texts, ["Me.<|im_end|>"]);
    assert!(tokens < all_tokens, "{tokens} of {all_tokens}");
}

/// The generation prompt contains a closed thinking block, so the answer cannot contain another one.
#[test]
fn thinking_is_left_out_after_a_prompt_that_closes_thinking() {
    let rows = [ask("Who?", "<think>\nHm.\n</think>\n\nMe.")];
    let (report, texts) = prepare(&template_that_closes_thinking(), &rows, |_| {});
    assert_eq!(texts["1"], ["Me.<|im_end|>"]);
    let shown = report.to_string();
    assert!(
        shown.contains("answers in training: 1 without their thinking"),
        "{shown}"
    );
}

#[test]
fn thinking_dropped_by_the_template_is_restored() {
    let conversations = [two_turns(
        "<think>\nA.\n</think>\n\nHi.",
        "<think>B.</think>Bye.",
    )];
    let prepare_with = |template, thinking| {
        prepare(template, &conversations, |config| {
            config.data.thinking = thinking
        })
    };
    // Template, and the supervised texts of the two answers.
    for (template, first, last) in [
        (
            DROPS_THINKING,
            "<think>\nA.\n</think>\n\nHi.<|im_end|>",
            "<think>B.</think>Bye.<|im_end|>",
        ),
        (
            OPENS_THINKING,
            "A.\n</think>\n\nHi.<|im_end|>",
            "B.</think>Bye.<|im_end|>",
        ),
    ] {
        let (report, texts) = prepare_with(template, Thinking::Supervise);
        assert_eq!(texts["1"], [last], "{template}");
        assert_eq!(texts["1:1"], [first], "{template}");
        let shown = report.to_string();
        assert!(
            shown.contains(
                "answers in training: 2 with their thinking, which the chat template drops"
            ),
            "{shown}"
        );
        let (_, texts) = prepare_with(template, Thinking::Context);
        assert_eq!(texts["1"], ["Bye.<|im_end|>"], "{template}");
        assert_eq!(texts["1:1"], ["Hi.<|im_end|>"], "{template}");
        let (report, texts) = prepare_with(template, Thinking::Drop);
        assert_eq!(texts["1"].last().unwrap(), "Bye.<|im_end|>", "{template}");
        assert!(report.thinking.is_empty());
    }
}

/// A thinking block lacks its opening tag if the teacher's prompt ends with it, and its closing tag if it was
/// truncated.
#[test]
fn thinking_without_one_of_its_tags_is_detected() {
    let supervised_texts = |template: &str, answer: &str, thinking| {
        let (_, mut texts) = prepare(template, &[ask("Who?", answer)], |config| {
            config.data.thinking = thinking
        });
        texts.remove("1").unwrap()
    };
    let without_opening_tag = "Hm.\n</think>\n\nMe.";
    // Template, and the supervised text.
    for (template, supervised) in [
        (OPENS_THINKING, "Hm.\n</think>\n\nMe.<|im_end|>"),
        (
            KEEPS_LAST_THINKING,
            "<think>\nHm.\n</think>\n\nMe.<|im_end|>",
        ),
        (CHATML, "Hm.\n</think>\n\nMe.<|im_end|>"),
    ] {
        let texts = supervised_texts(template, without_opening_tag, Thinking::Supervise);
        assert_eq!(texts, [supervised], "{template}");
        for thinking in [Thinking::Context, Thinking::Drop] {
            let texts = supervised_texts(template, without_opening_tag, thinking);
            assert_eq!(texts, ["Me.<|im_end|>"], "{template}, {thinking:?}");
        }
    }
    let truncated = "<think>\nHm";
    let texts = supervised_texts(OPENS_THINKING, truncated, Thinking::Supervise);
    assert_eq!(texts, ["Hm<|im_end|>"]);
    let texts = supervised_texts(CHATML, truncated, Thinking::Supervise);
    assert_eq!(texts, ["<think>\nHm<|im_end|>"]);
    // An answer that mentions the tag has no thinking.
    let answer = "The tag </think> ends it.";
    let texts = supervised_texts(CHATML, answer, Thinking::Drop);
    assert_eq!(texts, [format!("{answer}<|im_end|>")]);
}

#[test]
fn thinking_only_answer_is_empty_if_thinking_is_not_trained() {
    let closing = template_that_closes_thinking();
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
        let (report, texts) = prepare(
            template,
            &[ask("Who?", answer), ask("Who?", "Me.")],
            |config| config.data.thinking = thinking,
        );
        assert_eq!(texts.len(), 1, "{answer}, {thinking:?}: {texts:?}");
        let dropped: Vec<_> = report.dropped.keys().collect();
        assert_eq!(dropped, ["the answer is empty"], "{answer}, {thinking:?}");
    }
}
