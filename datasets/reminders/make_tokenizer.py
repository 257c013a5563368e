#!/usr/bin/env python3
"""Trains the byte-level BPE tokenizer of the reminders task on teacher_train.jsonl.gz and writes tokenizer/.

    pip install "tokenizers>=0.21"
    python3 make_tokenizer.py [--vocab 2048]
"""

import argparse
import gzip
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Splits text as GPT-2 does, but digits in pairs, and JSON keys with the punctuation around them, so that
# `{"action":"`, `","title":"` and `"],"place":"` can become one token each.
SPLIT = "|".join([
    r'(?:\{|"?\]?,)"[a-z_]+":\[?"?',  # a key, with the end of the value before it and the start of its own
    r'"?\]?\}|","',                   # the end of the object; between two strings of a list
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r" ?\p{L}+",
    r" ?\p{N}{1,2}",
    r' ?[^\s\p{L}\p{N}"]+|"',
    r"\s+(?!\S)|\s+",
])

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def corpus():
    with gzip.open(HERE / "teacher_train.jsonl.gz", "rt", encoding="utf-8") as rows:
        for row in rows:
            for message in json.loads(row)["messages"]:
                yield message["role"] + "\n"
                yield message["content"]


def write(name, value):
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    (HERE / "tokenizer" / name).write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=2048)
    size = parser.parse_args().vocab

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))

    (HERE / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(HERE / "tokenizer" / "tokenizer.json"))
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    })
    write("special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    write("generation_config.json", {"eos_token_id": [ids[2], ids[0]], "pad_token_id": ids[0]})
    write("chat_template.jinja", CHAT_TEMPLATE)

    lengths = [len(tokenizer.encode(text).ids) for text in corpus() if not text.endswith("\n")]
    users, answers = lengths[0::2], lengths[1::2]
    frame = len(tokenizer.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>").ids)
    print("vocabulary %d; mean tokens: text %.1f, answer %.1f (longest %d), template %d, total %.1f (longest %d)" % (
        tokenizer.get_vocab_size(), sum(users) / len(users), sum(answers) / len(answers), max(answers), frame,
        sum(lengths) / len(users) + frame, max(u + a for u, a in zip(users, answers)) + frame))


if __name__ == "__main__":
    main()
