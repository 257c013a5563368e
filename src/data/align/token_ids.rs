//! Tokens that are named by id, as by vLLM's `return_tokens_as_token_ids`.

use crate::cache::logprobs_view::LogprobsView;
use crate::tokenizer::Tokenizer;

const PREFIX: &str = "token_id:";

/// Returns the id in a name such as `token_id:42`; None for any other name.
pub(crate) fn parse(name: &[u8]) -> Option<u32> {
    let name = std::str::from_utf8(name).ok()?;
    let digits = name.strip_prefix(PREFIX)?;
    // `str::parse` accepts a leading plus sign.
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number)
}

/// Returns true if all emitted tokens are named by id.
pub(crate) fn are_ids<T: AsRef<[u8]>>(tokens: &[T]) -> bool {
    !tokens.is_empty() && tokens.iter().all(|name| parse(name.as_ref()).is_some())
}

/// Replaces the ids of tokens with their bytes. Tokens without bytes, and ids that the tokenizer does not have, become
/// empty, which means that their bytes are unknown.
pub(crate) fn decode_ids<'t>(
    teacher: &LogprobsView<'t>,
    tokenizer: &Tokenizer,
) -> LogprobsView<'t> {
    teacher.map_tokens(|name| {
        let id = parse(name)?;
        let spelling = tokenizer.spelling(id);
        Some(spelling.map_or_else(Vec::new, |bytes| bytes.into_owned()))
    })
}
