"""Trains a student of each architecture, initialised by transformers, with `distill train`.

usage: architectures.py DISTILL DEMO_DIR FOLDER

For each architecture, `save_pretrained` writes a small decoder with random weights into FOLDER. It has the
tokenizer of the demo's teacher, and is trained for some steps on the demo's cache: all weights, or adapters
in the case `lora`. transformers_check.py compares the students.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
LLAMA_LIKE = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=512)
ARCHITECTURES = {
    "llama": LLAMA_LIKE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": LLAMA_LIKE | dict(sliding_window=16, tie_word_embeddings=False),
    "qwen2": LLAMA_LIKE | dict(use_sliding_window=True, sliding_window=16, max_window_layers=1,
                               tie_word_embeddings=True),
    "qwen3": LLAMA_LIKE | dict(head_dim=32, tie_word_embeddings=True),
    "gpt2": dict(n_embd=96, n_layer=3, n_head=4, n_positions=512),
}
STEPS = 30


def main():
    distill, demo, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    teacher = AutoConfig.from_pretrained(demo / "teacher")
    for name, settings in ARCHITECTURES.items():
        torch.manual_seed(0)
        start = folder / name / "start"
        config = AutoConfig.for_model(name, vocab_size=teacher.vocab_size, bos_token_id=None,
                                      eos_token_id=teacher.eos_token_id, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(start)
        for file in TOKENIZER:
            if (demo / "teacher" / file).exists():
                shutil.copy(demo / "teacher" / file, start)
        runs = {"full": "", "lora": "lora.rank=8"} if name in ("llama", "gpt2") else {"full": ""}
        for run, more in runs.items():
            train(distill, demo, start, folder / name / run, more)


def train(distill, demo, start, run, more):
    config = run.with_suffix(".toml")
    config.write_text(f"""
run_dir = {json.dumps(str(run.resolve()))}
[data]
cache = {json.dumps(str((demo / "harvest/cache").resolve()))}
validation_share = 0.05
[student]
path = {json.dumps(str(start.resolve()))}
[train]
steps = {STEPS}
batch_size = 16
micro_batch_size = 16
learning_rate = 3e-3
warmup_steps = 5
eval_every = 0
""")
    command = [distill, "train", "-c", str(config)]
    done = subprocess.run(command + (["--set", more] if more else []), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line).get("loss") for line in open(run / "metrics.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == STEPS and losses[-1] < 0.95 * losses[0], losses
    print(f"{run.parent.name}, {run.name}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps")


if __name__ == "__main__":
    main()
