//! Soft labels of answers of an encoder-decoder, whose tokenizer writes a space before each text and normalises it.

use distill::cache::record::Logprobs;
use distill::data::align::aligned::Aligned;
use distill::data::align::{Mapper, StudentAnswer};
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;

use super::{folder, id, ids};

/// A token of a teacher with its alternatives and their probabilities. The first alternative is the token itself.
type Row<'a> = (&'a str, &'a [(&'a str, f32)]);

/// Returns the teacher's logprobs of an answer.
fn logprobs(rows: &[Row]) -> Logprobs {
    let top = |row: &Row| row.1.iter().map(|(token, _)| (*token).into()).collect();
    Logprobs {
        token: rows.iter().map(|row| row.0.into()).collect(),
        logprob: rows.iter().map(|row| Some(row.1[0].1.ln())).collect(),
        top: rows.iter().map(top).collect(),
        top_logprob: rows
            .iter()
            .map(|row| row.1.iter().map(|(_, share)| Some(share.ln())).collect())
            .collect(),
        raw: Vec::new(),
        matches_text: true,
    }
}

/// The tokens of an answer in the tiny vocabulary, with their soft labels.
struct AnswerLabels {
    tokenizer: Tokenizer,
    ids: Vec<u32>,
    /// End of each token in bytes of the answer.
    ends: Vec<usize>,
    aligned: Aligned,
}

impl AnswerLabels {
    /// Aligns a teacher's tokens of an answer with those of the student.
    fn new(answer: &str, rows: &[Row]) -> Self {
        let dir = folder();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let messages = [Message::new("user", "a"), Message::new("assistant", answer)];
        let encoded = tokenizer.conversation(&messages).unwrap();
        let tokens = &encoded.answers[0];
        let ids = encoded.ids[tokens.supervised.clone()].to_vec();
        let ends = tokens.token_ends.clone().unwrap();
        let student = StudentAnswer {
            ids: &ids,
            ends: Some(&ends),
        };
        let teacher = logprobs(rows);
        let aligned = Mapper::new(&tokenizer, None)
            .align(
                &(&teacher).into(),
                answer.as_bytes(),
                0..answer.len(),
                student,
                None,
            )
            .unwrap();
        Self {
            tokenizer,
            ids,
            ends,
            aligned,
        }
    }

    /// Returns the ids of the soft labels at a position.
    fn soft_ids(&self, position: usize) -> &[u32] {
        self.aligned.soft(position).0
    }

    /// Returns the soft labels at a position as tokens with probabilities of two digits.
    fn shares(&self, position: usize) -> Vec<(String, f32)> {
        let (ids, logprobs) = self.aligned.soft(position);
        let names = ids.iter().map(|&id| self.tokenizer.token_name(id));
        let shares = logprobs
            .iter()
            .map(|logprob| (logprob.exp() * 100.0).round() / 100.0);
        names.zip(shares).collect()
    }

    /// Returns the first token and the number of tokens of each chunk, with its probability in two digits.
    fn chunks(&self) -> Vec<(usize, usize, f32)> {
        let chunks = self.aligned.chunks().iter();
        let chunks = chunks.map(|chunk| (chunk.start, chunk.len, (-chunk.nll).exp()));
        chunks
            .map(|(start, len, share)| (start, len, (share * 100.0).round() / 100.0))
            .collect()
    }
}

fn shares(expected: &[(&str, f32)]) -> Vec<(String, f32)> {
    let own = |(name, share): &(&str, f32)| ((*name).to_owned(), *share);
    expected.iter().map(own).collect()
}

/// `<`, `/` and `>` are not in the vocabulary, and `{` is not either.
#[test]
fn unknown_text_keeps_its_place_and_has_no_soft_labels() {
    // The teacher is a decoder with other tokens: its first token has no space before it.
    let labels = AnswerLabels::new(
        "the {} cat",
        &[
            ("the", &[("the", 0.9), ("cat", 0.05)]),
            (" ", &[(" ", 0.8), (" cat", 0.1)]),
            ("{}", &[("{}", 0.7), ("on", 0.1)]),
            (" cat", &[(" cat", 0.9), (" mat", 0.06)]),
            ("<|im_end|>", &[("<|im_end|>", 0.9)]),
        ],
    );
    assert_eq!(labels.ids, ids(&["▁the", "▁", "<unk>", "▁cat", "</s>"]));
    assert_eq!(labels.ends, [3, 4, 6, 10]);
    // At the first position, candidates get the space that the student's tokenizer writes.
    assert_eq!(labels.soft_ids(0), ids(&["▁the", "▁cat"]));
    assert_eq!(labels.soft_ids(1), ids(&["▁", "▁cat"]));
    assert!(labels.soft_ids(2).is_empty());
    assert_eq!(labels.soft_ids(3), ids(&["▁cat", "▁mat"]));
    assert_eq!(labels.soft_ids(4), ids(&["</s>"]));
}

/// The vocabulary has no line break: the tokenizer reads it as a space.
#[test]
fn normalised_text_is_aligned_by_its_offsets() {
    let labels = AnswerLabels::new(
        "the\n\ncat",
        &[
            ("the", &[("the", 0.9), ("cat", 0.05)]),
            ("\n\ncat", &[("\n\ncat", 0.7), (" mat", 0.1)]),
        ],
    );
    assert_eq!(labels.ids, ids(&["▁the", "▁cat", "</s>"]));
    assert_eq!(labels.soft_ids(1), ids(&["▁cat", "▁mat"]));
}

/// NFKC writes one character as two letters: both tokens belong to the teacher's token, and the next one is not shifted.
#[test]
fn character_that_becomes_two_tokens_does_not_shift_soft_labels() {
    let labels = AnswerLabels::new(
        "\u{fb01} on",
        &[
            ("\u{fb01}", &[("\u{fb01}", 0.9), ("cat", 0.05)]),
            (" on", &[(" on", 0.7), (" in", 0.1)]),
            ("</s>", &[("</s>", 0.8)]),
        ],
    );
    assert_eq!(labels.ids, ids(&["▁", "f", "i", "▁on", "</s>"]));
    assert_eq!(labels.soft_ids(3), ids(&["▁on", "▁in"]));
    assert_eq!(labels.soft_ids(4), ids(&["</s>"]));
    // No soft label of a position contains a token of another one.
    let has_next = |position| labels.soft_ids(position).contains(&id("▁on"));
    assert!(!has_next(0) && !has_next(1) && labels.soft_ids(2).is_empty());
}

/// NFKC makes one character of two, and two of one. A token of the student that ends inside a character of the answer
/// forms a group with the next one.
#[test]
fn tokens_end_between_characters_of_the_answer() {
    let composed = AnswerLabels::new(
        "e\u{301} the",
        &[
            ("e", &[("e", 0.9), ("a", 0.05)]),
            ("\u{301}", &[("\u{301}", 0.5)]),
            (" the", &[(" the", 0.6), (" cat", 0.2)]),
        ],
    );
    assert_eq!(composed.ids, ids(&["▁\u{e9}", "▁the", "</s>"]));
    assert_eq!(composed.ends, [3, 7]);
    assert!(composed.shares(0).is_empty());
    assert_eq!(composed.chunks(), [(0, 1, 0.45)]);
    assert_eq!(composed.shares(1), shares(&[("▁the", 0.6), ("▁cat", 0.2)]));

    let composed_last = AnswerLabels::new(
        "the e\u{301}",
        &[
            ("the", &[("the", 0.9)]),
            (" e\u{301}", &[(" e\u{301}", 0.8), (" cat", 0.1)]),
        ],
    );
    assert_eq!(composed_last.ends, [3, 7]);
    let expected = shares(&[("▁\u{e9}", 0.8), ("▁cat", 0.1)]);
    assert_eq!(composed_last.shares(1), expected);

    let ligature = AnswerLabels::new(
        "\u{fb01}ng on",
        &[
            ("\u{fb01}", &[("\u{fb01}", 0.9), ("cat", 0.05)]),
            ("ng", &[("ng", 0.5), ("t", 0.3)]),
            (" on", &[(" on", 0.7), (" in", 0.1)]),
        ],
    );
    assert_eq!(ligature.ids, ids(&["▁", "f", "ing", "▁on", "</s>"]));
    assert_eq!(ligature.ends, [0, 5, 5, 8]);
    assert!((0..3).all(|position| ligature.shares(position).is_empty()));
    assert_eq!(ligature.chunks(), [(0, 3, 0.45)]);
    assert_eq!(ligature.shares(3), shares(&[("▁on", 0.7), ("▁in", 0.1)]));
}

/// The likelihood of a text is trained also where normalisation has changed the text, but not with the unknown token.
#[test]
fn likelihood_of_normalised_text_is_trained() {
    let labels = AnswerLabels::new(
        "the\ncat {on}",
        &[
            ("the", &[("the", 0.9)]),
            ("\n", &[("\n", 0.8)]),
            ("cat", &[("cat", 0.5)]),
            (" {", &[(" {", 0.5)]),
            ("on}", &[("on}", 0.5)]),
        ],
    );
    assert_eq!(labels.ids[..2], ids(&["▁the", "▁cat"]));
    assert_eq!(labels.chunks(), [(1, 1, 0.4)]);
}

/// A sampled `<unk>` or `<pad>` of a teacher has no text. The other positions keep their soft labels.
#[test]
fn control_token_inside_a_teacher_answer_costs_no_other_position() {
    let labels = AnswerLabels::new(
        "the cat",
        &[
            ("the", &[("the", 0.9), ("cat", 0.05)]),
            ("<unk>", &[("<unk>", 0.4), (" cat", 0.4)]),
            (" cat", &[(" cat", 0.7), (" mat", 0.1)]),
            ("</s>", &[("</s>", 0.8)]),
        ],
    );
    assert_eq!(labels.soft_ids(0), ids(&["▁the", "▁cat"]));
    assert_eq!(labels.soft_ids(1), ids(&["▁cat", "▁mat"]));
    assert_eq!(labels.soft_ids(2), ids(&["</s>"]));
}

/// The student writes a space before the first word, whether or not the word is one token.
#[test]
fn alternatives_of_the_first_token_begin_a_word() {
    let alternatives: &[_] = &[("who", 0.5), ("the", 0.2), ("cat", 0.15), ("x", 0.1)];
    let labels = AnswerLabels::new("who", &[("who", alternatives)]);
    assert_eq!(labels.ids, ids(&["▁", "w", "h", "o", "</s>"]));
    let expected = shares(&[("▁", 0.6), ("▁the", 0.2), ("▁cat", 0.15)]);
    assert_eq!(labels.shares(0), expected);
    // After the space alone, the alternatives that are tokens of their own cannot follow.
    assert!(labels.shares(1).is_empty());
    // Normalisation changes the first word.
    let labels = AnswerLabels::new("ｔhe", &[("ｔhe", &[("ｔhe", 0.7), ("cat", 0.2)])]);
    assert_eq!(labels.ids, ids(&["▁the", "</s>"]));
    assert_eq!(labels.shares(0), shares(&[("▁the", 0.7), ("▁cat", 0.2)]));
}

/// A teacher may report the space that SentencePiece writes before its first token, and not write it in the answer.
#[test]
fn space_of_the_first_teacher_token_is_not_part_of_the_answer() {
    let spellings = [[" the", " cat", " sat"], ["▁the", "▁cat", "▁sat"]];
    for ([the, cat, sat], is_after_control) in spellings.into_iter().zip([false, true]) {
        let control: Row = ("<pad>", &[("<pad>", 0.9)]);
        // A token without the space is another token.
        let first: Row = (the, &[(the, 0.5), (cat, 0.3), ("c", 0.1)]);
        let second: Row = (cat, &[(cat, 0.6), (sat, 0.2)]);
        let rows = [control, first, second];
        let labels = AnswerLabels::new("the cat", &rows[usize::from(!is_after_control)..]);
        assert_eq!(labels.ids, ids(&["▁the", "▁cat", "</s>"]));
        let first = shares(&[("▁the", 0.5), ("▁cat", 0.3), ("c", 0.1)]);
        assert_eq!(labels.shares(0), first, "{the:?}");
        let second = shares(&[("▁cat", 0.6), ("▁sat", 0.2)]);
        assert_eq!(labels.shares(1), second, "{the:?}");
    }
}

/// A word that is several tokens of the student begins with the space.
#[test]
fn alternatives_inside_an_answer_keep_their_space() {
    let labels = AnswerLabels::new(
        "the who",
        &[
            ("the", &[("the", 0.9)]),
            (" who", &[(" who", 0.5), (" why", 0.2), (" cat", 0.1)]),
        ],
    );
    assert_eq!(labels.ids, ids(&["▁the", "▁", "w", "h", "o", "</s>"]));
    assert_eq!(labels.shares(1), shares(&[("▁", 0.7), ("▁cat", 0.1)]));
    // Of the alternatives that begin with "w", both continue with "h"; then 0.5 of 0.7 continue with "o".
    assert!(labels.shares(2).is_empty());
    assert_eq!(labels.shares(3), shares(&[("h", 1.0)]));
    assert_eq!(labels.shares(4), shares(&[("o", 0.71), ("y", 0.29)]));
}
