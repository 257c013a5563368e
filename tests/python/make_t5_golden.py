"""Writes golden files of T5 models, computed by PyTorch, for the Rust tests of encoder-decoders.

usage: make_t5_golden.py OUTPUT_DIR [--only NAME ...]

NAME is a case (t5, t5_v1_1, mt5), `buckets` or `generate`. transformers 5 always ties the embeddings of T5, so
transformers 4.57 made the untied cases t5_v1_1 and mt5. transformers 5.24 made the rest (check.sh installs both):

    target/python/bin/python tests/python/make_t5_golden.py tests/it/golden/t5 --only t5 buckets generate
    PYTHONPATH=target/transformers4 target/python/bin/python tests/python/make_t5_golden.py tests/it/golden/t5 \\
        --only t5_v1_1 mt5

The cases are small models with random weights, in double precision, although transformers computes the variance of
T5LayerNorm (and transformers 4.57 the softmax) in single precision. Each sequence is a batch of its own, without
padding. CASE.safetensors has `weight.*` (the initial weights in f32; tied embeddings once, as `shared.weight`),
`gradient.*` and `logits.*` (one tensor per sequence, target length x vocabulary); CASE.json has all other data.
`source` is the encoder's input. `ids` is the decoder's input, which begins with the start token 0, and the last label,
`</s>` (1). The loss is (1/N) sum [(1 - lambda) CE + lambda KD] over all labels, where KD is the divergence on the top-k
and the tail. A position without soft labels has CE alone.

buckets.json has the bucket of each relative position (key minus query) from `first` to `last`, for encoders
(bidirectional) and decoders.

generate.safetensors is the checkpoint of a briefly trained model with the configuration of the case t5, under the names
of transformers. generate.json has its greedy completions, without the start token, with `</s>` where a completion ends
by itself. `smallest_gap` is the smallest difference between the two largest logits at any generated token.
"""

import argparse
import json
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention

from make_gradient_golden import LAMBDA, random_targets

SOURCE_LENGTHS = [41, 1, 17, 150]
TARGET_LENGTHS = [9, 12, 1, 40]
VOCABULARY = 61
START, END = 0, 1
FIRST_TOKEN = 3
T5_LIKE = dict(vocab_size=VOCABULARY, d_model=32, d_kv=6, num_heads=4, d_ff=48, dropout_rate=0.0,
               decoder_start_token_id=START)
CASES = {
    "t5": ("t5", T5_LIKE | dict(feed_forward_proj="relu", num_layers=2, num_decoder_layers=3,
                                relative_attention_num_buckets=32, relative_attention_max_distance=128,
                                tie_word_embeddings=True)),
    "t5_v1_1": ("t5", T5_LIKE | dict(feed_forward_proj="gated-gelu", num_layers=2, num_decoder_layers=2,
                                     relative_attention_num_buckets=8, relative_attention_max_distance=20,
                                     tie_word_embeddings=False)),
    "mt5": ("mt5", T5_LIKE | dict(feed_forward_proj="gated-gelu", d_kv=12, num_layers=2, num_decoder_layers=1,
                                  tie_word_embeddings=False)),
}
LARGEST_DISTANCE = 400
BUCKETS = [(32, 128), (8, 20), (16, 64), (64, 256), (32, 1000)]
PROMPTS = 20
MAX_NEW_TOKENS = 24
TRAINING_STEPS = 55
SMALLEST_GAP = 1e-3


def new_model(name, **more):
    kind, settings = CASES[name]
    config = AutoConfig.for_model(kind, **settings, **more)
    if config.tie_word_embeddings != settings["tie_word_embeddings"]:
        raise SystemExit(f"this version of transformers ties the embeddings of {name}: use transformers 4.57")
    config._attn_implementation = "eager"
    return AutoModelForSeq2SeqLM.from_config(config)


def make_case(name, folder):
    torch.manual_seed(len(name))
    model = new_model(name, use_cache=False)
    for parameter_name, parameter in model.named_parameters():
        if "relative_attention_bias" in parameter_name:
            parameter.data.normal_(0, 0.5)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.uniform_(0.5, 1.5)
    model.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = model.double()
    sequences, terms, logits = [], [], {}
    for index, (source_length, target_length) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS)):
        source = torch.randint(FIRST_TOKEN, VOCABULARY, (source_length,))
        ids = torch.randint(FIRST_TOKEN, VOCABULARY, (target_length + 1,))
        ids[0], ids[-1] = START, END
        output = model(input_ids=source[None], decoder_input_ids=ids[None, :-1]).logits[0]
        logits[f"logits.{index}"] = output.detach().float()
        logq = output.log_softmax(-1)
        soft, sequence_terms = random_targets(logq, ids, range(target_length))
        terms += sequence_terms
        sequences.append({"source": source.tolist(), "ids": ids.tolist(), "first": 0, "soft": soft})
    loss = torch.stack(terms).mean()
    loss.backward()
    tensors = {f"weight.{name}": weight.contiguous() for name, weight in weights.items()}
    tensors |= {f"gradient.{name}": p.grad.float().contiguous() for name, p in model.named_parameters()}
    save_file(tensors | logits, folder / f"{name}.safetensors")
    rest = {"config": model.config.to_dict(), "adapter_scale": 1.0, "lambda": LAMBDA, "loss": loss.item(),
            "sequences": sequences}
    (folder / f"{name}.json").write_text(json.dumps(rest) + "\n")


def make_buckets(folder):
    positions = torch.arange(-LARGEST_DISTANCE, LARGEST_DISTANCE + 1)
    lines = []
    for bidirectional in (True, False):
        for num_buckets, max_distance in BUCKETS:
            buckets = T5Attention._relative_position_bucket(positions, bidirectional, num_buckets, max_distance)
            table = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance,
                     "buckets": buckets.tolist()}
            lines.append(json.dumps(table, separators=(",", ":")))
    tables = ",\n".join(lines)
    text = f'{{"first":{-LARGEST_DISTANCE},"last":{LARGEST_DISTANCE},"tables":[\n{tables}\n]}}\n'
    (folder / "buckets.json").write_text(text)


def make_generate(folder):
    for seed in count():
        torch.manual_seed(seed)
        sources = [torch.randint(FIRST_TOKEN, VOCABULARY, (int(length),)) for length in torch.linspace(5, 120, PROMPTS)]
        model = trained_model(sources)
        completions, gaps = zip(*(greedy(model, source) for source in sources))
        ended = sum(completion[-1] == END for completion in completions)
        if min(gaps) >= SMALLEST_GAP and 0 < ended < PROMPTS:
            break
    tensors = {name: parameter.detach().float().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "generate.safetensors", metadata={"format": "pt"})
    sequences = [{"source": source.tolist(), "generated": completion}
                 for source, completion in zip(sources, completions)]
    rest = {"config": model.config.to_dict(), "max_new_tokens": MAX_NEW_TOKENS, "smallest_gap": min(gaps),
            "sequences": sequences}
    (folder / "generate.json").write_text(json.dumps(rest) + "\n")


def trained_model(sources):
    """Trains a model on a random target per source: long enough for varied completions, too short to learn them."""
    model = new_model("t5").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    input_ids = pad_sequence(sources, batch_first=True)
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    targets = [torch.randint(FIRST_TOKEN, VOCABULARY, (int(length),)) for length in torch.randint(2, 31, (PROMPTS,))]
    labels = pad_sequence([torch.cat([target, torch.tensor([END])]) for target in targets], batch_first=True,
                          padding_value=-100)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    return model.double().eval()


def greedy(model, source):
    """Returns the completion and the smallest gap between the two largest logits on its path."""
    # The KV cache of transformers 5.24 has `num_layers` layers, fewer than this decoder.
    output = model.generate(source[None], do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS, use_cache=False,
                            return_dict_in_generate=True, output_logits=True)
    top = torch.stack(output.logits)[:, 0].topk(2).values
    return output.sequences[0, 1:].tolist(), (top[:, 0] - top[:, 1]).min().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*CASES, "buckets", "generate"],
                        default=[*CASES, "buckets", "generate"])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if name == "buckets":
            make_buckets(arguments.folder)
        elif name == "generate":
            make_generate(arguments.folder)
        else:
            make_case(name, arguments.folder)


if __name__ == "__main__":
    main()
