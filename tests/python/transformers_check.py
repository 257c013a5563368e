"""Checks that a model folder of `distill train` has the same logits and greedy text in transformers.

usage: transformers_check.py DISTILL MODEL_DIR PROMPTS.jsonl [COUNT]

`distill serve` answers COUNT prompts (20 by default) greedily with the logprobs of the 20 likeliest
tokens at each position. transformers loads the folder with its Auto classes, applies the folder's
chat template and generates greedily. The texts must be equal, and every logprob must agree within
1e-3. A logprob is a logit minus the log-sum-exp of its row, so this compares the logits up to a
constant per row.
"""

import json
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TOLERANCE = 1e-3
MAX_TOKENS = 64


@contextmanager
def served(distill, model_dir):
    """Serves the model while the block runs; yields the base URL."""
    command = [distill, "serve", "--model", model_dir, "--port", "0", "--name", "model"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield line.removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(base_url, messages):
    body = {
        "model": "model",
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "top_logprobs": 20,
    }
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]


def main():
    distill, model_dir, prompts = sys.argv[1:4]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    # For model_type qwen2, AutoTokenizer replaces the folder's pre-tokenizer by Qwen's own.
    qwen2 = AutoConfig.from_pretrained(model_dir).model_type == "qwen2"
    tokenizer = (PreTrainedTokenizerFast if qwen2 else AutoTokenizer).from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with open(prompts, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count))]
    assert len(texts) == count, f"{prompts} has fewer than {count} rows"

    equal, compared, largest = 0, 0, 0.0
    with served(distill, model_dir) as base_url:
        for text in texts:
            messages = [{"role": "user", "content": text}]
            ours = ask(base_url, messages)
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                output = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=MAX_TOKENS,
                    return_dict_in_generate=True,
                    output_logits=True,
                    pad_token_id=tokenizer.eos_token_id,
                )
            new_tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
            theirs = tokenizer.decode(new_tokens, skip_special_tokens=True)
            same = ours["message"]["content"] == theirs
            equal += same
            if not same:
                print(f"prompt {text!r}\n  distill      {ours['message']['content']!r}\n  transformers {theirs!r}")
                continue
            for position, logits in zip(ours["logprobs"]["content"], output.logits):
                reference = torch.log_softmax(logits[0].double(), dim=-1)
                by_rank = reference.sort(descending=True).values
                alternatives = position["top_logprobs"]
                for rank, alternative in enumerate(alternatives):
                    difference = abs(alternative["logprob"] - by_rank[rank].item())
                    largest = max(largest, difference)
                    compared += 1
                best = reference.argmax().item()
                assert tokenizer.decode([best]) == alternatives[0]["token"], (best, alternatives[0])
    print(f"greedy text: {equal} of {count} prompts equal")
    print(f"logits: {compared} compared, largest difference {largest:.1e} (allowed: {TOLERANCE:.0e})")
    return 0 if equal == count and compared > 0 and largest < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
