//! Names of control tokens, as servers report them in logprobs.

/// Returns true if `name` is a control token of a widely used tokenizer.
pub(crate) fn is_control_name(name: &str) -> bool {
    const OTHERS: [&str; 4] = ["<s>", "<bos>", "<pad>", "<unk>"];
    // "<||>" is not a name.
    const MIN_LENGTH: usize = 5;
    is_end_of_turn_name(name)
        || OTHERS.contains(&name)
        || (name.starts_with("<|") && name.ends_with("|>") && name.len() >= MIN_LENGTH)
        || (name.starts_with("<｜") && name.ends_with("｜>"))
}

/// Returns true if `name` is an end-of-turn token of a widely used tokenizer.
pub(crate) fn is_end_of_turn_name(name: &str) -> bool {
    const ENDS: [&str; 14] = [
        "</s>",
        "<eos>",
        "<end_of_turn>",
        "<turn|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|endoftext|>",
        "<｜end▁of▁sentence｜>",
    ];
    ENDS.contains(&name)
}
