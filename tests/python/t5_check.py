"""Checks that a T5 folder saved by distill is equal to the original folder in transformers.

usage: t5_check.py FOLDER_ORIGINAL FOLDER_SAVED [--prompts FILE]

Every tensor (the head included) is equal bit for bit, the logits of random input are equal, and the tokenizers, if the
original folder has one, give equal ids for some texts and for the `text` of each line of FILE. Works with
transformers 4.57 and 5.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

TEXTS = ["translate English to German: The house is wonderful.", "", "  two  spaces\tand a tab\n",
         "ﬁne Ⅳ ½ naïve 東京 🙂", "<extra_id_0> fills <extra_id_99> gaps</s>", "<pad><unk>"]
TOKENIZER_FILES = ["tokenizer.json", "spiece.model"]


def load(folder):
    model, loading = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    assert not missing and not unexpected, f"{folder}: missing {missing}, unexpected {unexpected}"
    return model.eval()


def random_logits(model):
    torch.manual_seed(0)
    source, target = (torch.randint(model.config.vocab_size, (2, length)) for length in (150, 40))
    mask = torch.ones_like(source)
    mask[1, 100:] = 0
    with torch.no_grad():
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("original", type=Path)
    parser.add_argument("saved", type=Path)
    parser.add_argument("--prompts", type=Path)
    arguments = parser.parse_args()

    original, saved = load(arguments.original), load(arguments.saved)
    tensors, saved_tensors = original.state_dict(), saved.state_dict()
    assert tensors.keys() == saved_tensors.keys(), tensors.keys() ^ saved_tensors.keys()
    assert "lm_head.weight" in tensors
    for name, tensor in tensors.items():
        ours = saved_tensors[name]
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), f"{name}: {ours.dtype} {ours.shape}"
        assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8)), f"{name}: values differ"
    logits = random_logits(original)
    assert logits.isfinite().all() and torch.equal(random_logits(saved), logits), "logits differ"
    print(f"{len(tensors)} tensors and the logits are equal")

    if any((arguments.original / file).exists() for file in TOKENIZER_FILES):
        texts = TEXTS
        if arguments.prompts:
            texts = TEXTS + [json.loads(line)["text"] for line in arguments.prompts.open(encoding="utf-8")]
        tokenizer, saved_tokenizer = (AutoTokenizer.from_pretrained(f) for f in (arguments.original, arguments.saved))
        for text in texts:
            ids, ours = tokenizer(text)["input_ids"], saved_tokenizer(text)["input_ids"]
            assert ours == ids, f"{text!r}: {ours} instead of {ids}"
        print(f"{len(texts)} texts have equal token ids")


if __name__ == "__main__":
    main()
