//! The prompt that an answer is trained behind is the one that a model generates from.

use distill::data::tokenizer::Tokenizer;
use distill::prompt::Message;
use tempfile::TempDir;

use super::{ask, folder, message};

/// As Qwen 3's: an empty block of thinking stands before the last answer.
const EMPTY_BLOCK: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
/// As R1's: a prompt opens the thinking, which a conversation does not have.
const OPENED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
/// As Mistral Nemo's: the system message moves to the last question.
const MOVED: &str = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.last or (loop.index == messages | length - 1) %}{{ messages[0].content }} {% endif %}{{ m.content }}<|im_end|>{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}";
/// As Qwen 3's for thinking: that of the last answer stays, in a form of its own.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}{% if loop.last %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

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
fn every_answer_that_is_learnt_is_behind_the_prompt_for_it() {
    let mut several = vec![message("system", "Be kind.")];
    several.extend(ask("Hello", "Hi."));
    several.extend(ask("And now?", "<think>\nHm, what?\n</think>\n\nBye."));
    let conversations: [Vec<Message>; 2] = [ask("Who?", "Me."), several];
    // Template, and what is supervised last of each.
    for (template, last) in [
        (
            EMPTY_BLOCK,
            [
                "<think>\n\n</think>\n\nMe.<|im_end|>",
                "<think>\n\n</think>\n\n<think>\nHm, what?\n</think>\n\nBye.<|im_end|>",
            ],
        ),
        (OPENED, ["Me.<|im_end|>", "Bye.<|im_end|>"]),
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
                if answer.is_behind_its_prompt {
                    let before = &conversation.ids[..answer.supervised.start];
                    assert_eq!(before, prompt, "{template}: {}", text(&tokenizer, before));
                }
            }
            let answer = conversation.answers.last().unwrap();
            assert!(answer.is_behind_its_prompt, "{template}");
            let supervised = &conversation.ids[answer.supervised.clone()];
            assert_eq!(text(&tokenizer, supervised), last, "{template}");
            // What it keeps of the content, and where the answer behind the thinking begins.
            let content = &messages[answer.message].content;
            assert!(
                content[answer.text.clone()].ends_with(if messages.len() == 2 {
                    "Me."
                } else {
                    "Bye."
                })
            );
            let said = &conversation.ids[answer.after_thinking..answer.tokens.end];
            if messages.len() > 2 {
                assert_eq!(text(&tokenizer, said).trim(), "Bye.", "{template}");
            }
        }
    }
}

#[test]
fn prompts_that_differ_are_told_with_their_ends() {
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
fn the_token_that_ends_an_answer_is_a_stop_token() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder("bytelevel").join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    // A base model, whose own end is another one.
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
