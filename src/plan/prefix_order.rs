//! Order of the prompts for `prompts.order = "prefix"`. Pure.

use std::collections::HashMap;

use crate::prompt::Prompt;

/// Length in bytes of the common prefix by which prompts are grouped. OpenAI caches prefixes of at least 1,024
/// tokens, about four bytes each.
const SHARED_PREFIX_BYTES: usize = 4_096;

/// Returns the indices of the prompts in an order in which the provider's prompt cache saves the most.
///
/// Prompts with the same first [`SHARED_PREFIX_BYTES`] bytes form a group, sorted by text, at the position of the
/// first of them. All other prompts keep their position, so that a run that ends early covers a sample of the prompts
/// and not only the beginning of the alphabet.
pub(crate) fn by_prefix(prompts: &[Prompt]) -> Vec<usize> {
    let prompt_text = |prompt: &Prompt| -> Vec<u8> {
        let parts = prompt.messages.iter().flat_map(|message| {
            [
                message.role.as_bytes(),
                b"\n",
                message.content.as_bytes(),
                b"\n",
            ]
        });
        parts.flatten().copied().collect()
    };
    let mut first_by_prefix = HashMap::new();
    let mut keys: Vec<(usize, Vec<u8>, usize)> = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let text = prompt_text(prompt);
        match text.get(..SHARED_PREFIX_BYTES) {
            None => keys.push((index, Vec::new(), index)),
            Some(prefix) => {
                let group = *first_by_prefix
                    .entry(*blake3::hash(prefix).as_bytes())
                    .or_insert(index);
                keys.push((group, text, index));
            }
        }
    }
    keys.sort();
    keys.into_iter().map(|(_, _, index)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::message::Message;

    fn prompt(id: &str, content: &str) -> Prompt {
        Prompt::plain(id, vec![Message::new("user", content)])
    }

    #[test]
    fn prefix_order_groups_prompts_with_a_long_common_prefix() {
        let long = |start: char, end: &str| format!("{}{end}", start.to_string().repeat(5_000));
        let prompts = [
            prompt("0", &long('z', "2")),
            prompt("1", "short"),
            prompt("2", &long('a', "1")),
            prompt("3", &long('z', "1")),
            prompt("4", "also short"),
        ];
        assert_eq!(by_prefix(&prompts), [3, 0, 1, 2, 4]);
    }
}
