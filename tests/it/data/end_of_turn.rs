//! The token that ends an answer, and the token that ends a turn.

use distill::tokenizer::Tokenizer;

use super::align::{align, logprobs};
use super::templates::{CHATML, prepare, tokenizer_with_template, two_turns};
use super::{ask, folder};

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
    std::fs::write(dir.path().join("chat_template.jinja"), CHATML).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().stop_ids(), [0, 2]);
    let without_end = CHATML.replace("<|im_end|>", "");
    std::fs::write(dir.path().join("chat_template.jinja"), without_end).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().stop_ids(), [0]);
}

/// Templates such as the one of Llama 2 write text between an answer and the end of its turn.
#[test]
fn answer_ends_at_the_first_template_text_of_the_end_of_turn() {
    const NEWLINE_BEFORE_END: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_dir, tokenizer) = tokenizer_with_template(NEWLINE_BEFORE_END);
    let newline = tokenizer.encode_text("\n").unwrap()[0];
    let end = tokenizer.id_of_control("<|im_end|>");
    assert_eq!(
        (tokenizer.end_of_answer(), tokenizer.end_of_turn()),
        (Some(newline), end)
    );
    let letter = tokenizer.encode_text("T").unwrap()[0];
    let end_row = (
        "<|im_end|>",
        -0.5,
        &[("<|im_end|>", Some(-0.5)), ("a", Some(-1.0))][..],
    );
    let text_row = ("T", -0.1, &[("T", Some(-0.1)), ("</s>", Some(-3.0))][..]);
    let align_answer =
        |rows: &[_]| align(&tokenizer, &logprobs(rows), "T", &[letter, newline]).unwrap();
    let aligned = align_answer(&[text_row, end_row]);
    assert_eq!(aligned.lists_end, Some(true));
    assert_eq!(aligned.soft(0), (&[letter, newline][..], &[-0.1, -3.0][..]));
    let other = tokenizer.encode_text("a").unwrap()[0];
    assert_eq!(aligned.soft(1), (&[newline, other][..], &[-0.5, -1.0][..]));
    assert_eq!(align_answer(&[text_row]).lists_end, Some(false));
    // The answer itself may contain the same token.
    let teacher = logprobs(&[("T", -0.1, &[]), ("\n", -0.1, &[]), end_row]);
    let aligned = align(&tokenizer, &teacher, "T\n", &[letter, newline, newline]).unwrap();
    assert_eq!((aligned.len(), aligned.lists_end), (3, Some(true)));
    let aligned = align(&tokenizer, &teacher, "T\n", &[letter, newline]).unwrap();
    assert_eq!((aligned.len(), aligned.lists_end), (2, None));
}

/// After the answer, this template writes the token that begins the next turn, which does not stop a model.
#[test]
fn control_tokens_that_are_not_stop_tokens_do_not_end_turns() {
    const ENDLESS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let messages = two_turns("Hi.", "Bye.");
    let (report, texts) = prepare(ENDLESS, &[messages], |_| {});
    assert_eq!(texts["1"], ["Hi.", "Bye."]);
    assert_eq!((report.answers, report.without_end), (2, 2));
}

#[test]
fn answers_without_end_of_turn_token_are_counted() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let (report, texts) = prepare(template, &[ask("Who?", "Me.")], |_| {});
    assert_eq!((report.answers, report.without_end), (1, 1));
    assert_eq!(texts["1"], ["Me."]);
    let shown = report.to_string();
    assert!(
        shown.contains("1 of 1 answers have no end-of-turn token"),
        "{shown}"
    );
}
