"""Writes logits, loss and the gradient of every parameter, computed by PyTorch, for `tests/it/gradients/torch.rs`.

usage: make_gradient_golden.py OUTPUT_DIR

The models are small decoders of transformers with random weights, in double precision. Each sequence is
a batch of its own, without padding or packing. NAME.safetensors has `weight.*` (the initial weights in
f32), `gradient.*` and `logits.*` (one tensor per sequence); NAME.json has all other data. In the case
`lora`, PEFT's adapters are trained.
The loss is (1/N) sum [(1 - lambda) CE + lambda KD], where KD is the divergence on the top-k and the tail. A
position without soft labels has CE alone.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = [41, 1, 17, 66]
K = 5
LAMBDA = 0.3
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_LIKE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=61, max_position_embeddings=128)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0)
LORA = dict(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
CASES = {
    "tied": ("llama", LLAMA_LIKE | dict(tie_word_embeddings=True)),
    "untied": ("llama", LLAMA_LIKE | dict(tie_word_embeddings=False, rope_parameters=LLAMA3, head_dim=12)),
    "biases": ("llama", LLAMA_LIKE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": ("mistral", LLAMA_LIKE | dict(sliding_window=7, tie_word_embeddings=False)),
    "qwen2": ("qwen2", LLAMA_LIKE | dict(use_sliding_window=True, sliding_window=9, max_window_layers=1,
                                         tie_word_embeddings=True)),
    "qwen3": ("qwen3", LLAMA_LIKE | dict(head_dim=12, tie_word_embeddings=True)),
    "gpt2": ("gpt2", GPT2),
    "lora": ("llama", LLAMA_LIKE | dict(tie_word_embeddings=True)),
}


def make(name, kind, settings, folder):
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(kind, use_cache=False, **settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.uniform_(0.5, 1.5)
    model.train()
    named = {plain(name): parameter for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    model = model.double()
    sequences, terms, logits = [], [], {}
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(61, (length + 1,))
        first = int(torch.randint(length, ()))
        output = model(input_ids=ids[None, :-1]).logits[0]
        logits[f"logits.{index}"] = output.detach().float()
        logq = output.log_softmax(-1)
        soft, sequence_terms = random_targets(logq, ids, range(first, length))
        terms += sequence_terms
        sequences.append({"ids": ids.tolist(), "first": first, "soft": soft})
    loss = torch.stack(terms).mean()
    loss.backward()
    tensors = {f"weight.{name}": weight.contiguous() for name, weight in weights.items()}
    tensors |= {f"gradient.{name}": p.grad.float().contiguous() for name, p in named.items() if p.requires_grad}
    save_file(tensors | logits, folder / f"{name}.safetensors")
    rest = {"config": config.to_dict(), "adapter_scale": LORA["lora_alpha"] / LORA["r"], "lambda": LAMBDA, "loss": loss.item(), "sequences": sequences}
    (folder / f"{name}.json").write_text(json.dumps(rest) + "\n")


def random_targets(logq, ids, positions):
    """Draws the soft labels of `positions`. Returns them, None at a position without any, and the loss of each."""
    soft, terms = [], []
    for position in positions:
        ce = -logq[position, ids[position + 1]]
        if position % 4 == 3:
            soft.append(None)
            terms.append(ce)
            continue
        chosen = torch.randperm(logq.shape[-1])[:K]
        p = torch.rand(K).double() * 0.9 / K
        # The Rust test reads logprobs in single precision.
        logprobs = p.log().float()
        p = logprobs.double().exp()
        kept = logq[position, chosen]
        tail = 1 - p.sum()
        kd = (p * (p.log() - kept)).sum() + tail * (tail.log() - torch.log1p(-kept.exp().sum()))
        terms.append((1 - LAMBDA) * ce + LAMBDA * kd)
        soft.append({"ids": chosen.tolist(), "logprobs": logprobs.tolist()})
    return soft, terms


def plain(name):
    """Name of a parameter without the parts that PEFT adds."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, settings) in CASES.items():
        make(name, kind, settings, folder)


if __name__ == "__main__":
    main()
