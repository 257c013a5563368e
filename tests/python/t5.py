"""Checks encoder-decoders of `distill train` and `distill serve` with transformers.

usage: t5.py DISTILL FOLDER

For T5, T5 v1.1 and mT5, `save_pretrained` writes a small model with random weights into FOLDER. distill loads and saves
it, which must not change a bit (t5_check.py), trains it, and serves the result. transformers loads the trained folder:
its greedy answers to 20 sources must be equal, and the logprobs of their tokens must agree within 1e-3. Works with
transformers 4.57 and 5.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, __version__

from transformers_check import served, ask

SIZES = dict(d_model=64, d_kv=24, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4,
             decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
CASES = {
    "t5": ("t5", dict(feed_forward_proj="relu")),
    "t5_v1_1": ("t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("mt5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}
WORDS = "a cat sat on the red mat and one dog ran to his own house in rain while it was late".split()
STEPS = 40


def write_tokenizer(folder):
    """Writes a Unigram tokenizer with the layout of T5's. Returns its number of tokens."""
    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces += [("\u2581" + word, -4.0) for word in WORDS]
    pieces += [(piece, -8.0) for piece in ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]]
    pieces.append(("<extra_id_0>", 0.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>",
                "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(pieces)


def sources():
    return [" ".join(WORDS[(7 * number + index * index) % len(WORDS)] for index in range(1 + number))
            for number in range(20)]


def write_rows(path):
    rows = [{"messages": [{"role": "user", "content": source},
                          {"role": "assistant", "content": " ".join(reversed(source.split()[:5]))}]}
            for source in sources()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(distill, start, run, steps):
    config = run.with_suffix(".toml")
    config.write_text(f"""
run_dir = {json.dumps(str(run.resolve()))}
[data]
source = {json.dumps(str((start.parent.parent / "rows.jsonl").resolve()))}
validation_share = 0.0
[student]
path = {json.dumps(str(start.resolve()))}
[train]
steps = {steps}
batch_size = 10
micro_batch_tokens = 100
learning_rate = 3e-3
warmup_steps = 5
eval_every = 0
""")
    done = subprocess.run([distill, "train", "-c", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run / "student"


def compare(distill, student):
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForSeq2SeqLM.from_pretrained(student, dtype=torch.float32).eval()
    largest, tokens = 0.0, 0
    with served(distill, str(student)) as base_url:
        for source in sources():
            choice = ask(base_url, [{"role": "user", "content": source}])
            ids = torch.tensor([tokenizer(source)["input_ids"]])
            with torch.no_grad():
                output = model.generate(input_ids=ids, do_sample=False, num_beams=1, max_new_tokens=64)
                logits = model(input_ids=ids, decoder_input_ids=output[:, :-1]).logits[0]
            answer = output[0, 1:].tolist()
            text = tokenizer.decode(answer, skip_special_tokens=True)
            assert choice["message"]["content"] == text, (source, choice["message"]["content"], text)
            positions = choice["logprobs"]["content"]
            assert len(positions) == len(answer)
            # Rows after the last token are padding of the embedding, which `distill serve` leaves out.
            logprobs = logits[:, :len(tokenizer)].log_softmax(-1)
            for position, token, row in zip(positions, answer, logprobs):
                largest = max(largest, abs(position["logprob"] - row[token].item()))
                top = row.topk(20).values.tolist()
                ours = [alternative["logprob"] for alternative in position["top_logprobs"]]
                largest = max(largest, max(abs(a - b) for a, b in zip(ours, top)))
                tokens += 1
    assert largest < 1e-3, largest
    print(f"20 greedy texts equal, {tokens} tokens, logprobs within {largest:.1e}")


def main():
    distill, folder = sys.argv[1], Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl")
    for name, (kind, settings) in CASES.items():
        print(f"-- transformers {__version__}: {name}", flush=True)
        start = folder / name / "start"
        start.mkdir(parents=True)
        size = write_tokenizer(start)
        torch.manual_seed(3)
        config = AutoConfig.for_model(kind, vocab_size=size + 6, **SIZES, **settings)
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.save_pretrained(start)
        saved = train(distill, start, folder / name / "saved", 0)
        check = Path(__file__).with_name("t5_check.py")
        subprocess.run([sys.executable, str(check), str(start), str(saved)], check=True)
        compare(distill, train(distill, start, folder / name / "trained", STEPS))


if __name__ == "__main__":
    main()
