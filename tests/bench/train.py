"""Times training steps of PyTorch and transformers on random tokens, and prints them beside those of `distill`.

`train.py step OPTIONS` times PyTorch and prints a line of JSON. The example program `train` does the
same for distill. `train.py table PROGRAM` runs both in turn and prints the table.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152, batch=4),
    "tiny": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=8192, batch=8),
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, batch=8,
                     dropout_rate=0.0, decoder_start_token_id=0),
}


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(options):
    """Times `options.steps` steps after a warm-up step."""
    import contextlib

    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    imports = peak_mib()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = dict(SHAPES[options.shape])
    batch = options.batch or shape.pop("batch")
    shape.pop("batch", None)
    if options.vocabulary:
        shape["vocab_size"] = options.vocabulary
    is_t5 = options.shape.startswith("t5")
    length, k = options.length or (64 if is_t5 else 256), options.k
    if is_t5:
        config = T5Config(**shape, use_cache=False)
        config._attn_implementation = "sdpa"
        model = T5ForConditionalGeneration(config).to(options.device)
    else:
        config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=length, use_cache=False)
        config._attn_implementation = "sdpa"
        model = LlamaForCausalLM(config).to(options.device)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        layers = LoraConfig(r=options.lora, lora_alpha=options.lora, target_modules="all-linear")
        model = get_peft_model(model, layers)
    model.train()
    if options.checkpoint:
        model.gradient_checkpointing_enable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    vocabulary = config.vocab_size
    ids = torch.randint(vocabulary, (batch, length), device=options.device)
    sources = torch.randint(vocabulary, (batch, options.source), device=options.device) if is_t5 else None
    first = int(options.prompt * length)
    answers = length - first
    labels = torch.randint(vocabulary, (batch, answers), device=options.device)
    soft_ids = torch.rand(batch, answers, 4096, device=options.device).topk(max(k, 1)).indices
    mass = torch.full((batch, answers, max(k, 1)), 0.95 / max(k, 1), device=options.device)

    def loss():
        if options.skip_prompt:
            hidden = model.model(input_ids=ids).last_hidden_state[:, first:]
            logits = model.lm_head(hidden)
        elif is_t5:
            logits = model(input_ids=sources, decoder_input_ids=ids).logits[:, first:]
        else:
            logits = model(input_ids=ids).logits[:, first:]
        logq = F.log_softmax(logits.float(), -1)
        ce = F.nll_loss(logq.reshape(-1, vocabulary), labels.reshape(-1))
        if k == 0:
            return ce
        kept = logq.gather(-1, soft_ids)
        tail = 1 - mass.sum(-1)
        kd = (mass * (mass.log() - kept)).sum(-1)
        kd = kd + tail * (tail.log() - torch.log1p(-kept.exp().sum(-1).clamp(max=1 - 1e-7)))
        return 0.5 * ce + 0.5 * kd.mean()

    cast = contextlib.nullcontext()
    if options.dtype == "bf16":
        cast = torch.autocast(options.device, dtype=torch.bfloat16)
    if options.compile:
        loss = torch.compile(loss)
    seconds, losses = [], []
    for number in range(options.steps + 1):
        began = time.perf_counter()
        with cast:
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        if number > 0:
            seconds.append(time.perf_counter() - began)
    print(json.dumps({
        "parameters": sum(p.numel() for p in parameters),
        "tokens_per_s": [batch * (length + (options.source if is_t5 else 0)) / s for s in seconds],
        "losses": losses,
        "peak_mib": peak_mib(),
        "imports_mib": imports,
        "torch": torch.__version__,
    }))


# Label, options, and for each peer: its options, minimum speed ratio, maximum memory ratio (None: no aim).
CASES = [
    ("135M, f32", ["--shape", "135m"], [([], 1.25, 0.68)]),
    ("135M, f32, half prompt", ["--shape", "135m", "--prompt", "0.5"],
     [([], 1.25, 0.68), (["--skip-prompt"], None, None)]),
    ("tiny, f32", ["--shape", "tiny"], [([], 1.2, 0.3)]),
    ("tiny, f32, compiled peer", ["--shape", "tiny"], [(["--compile"], None, None)]),
    ("135M, f32, LoRA 16", ["--shape", "135m", "--lora", "16"], [([], None, None)]),
    ("t5-small, f32", ["--shape", "t5-small"], [([], 1.25, 0.6)]),
    ("135M, f32, 1 x 1024", ["--shape", "135m", "--batch", "1", "--length", "1024"], [([], None, None)]),
]
BF16_CASES = [
    ("135M, bf16", ["--shape", "135m", "--dtype", "bf16"], [([], 1.4, 0.68)]),
    ("135M, bf16, half prompt", ["--shape", "135m", "--dtype", "bf16", "--prompt", "0.5"],
     [([], 1.5, 0.68), (["--skip-prompt"], None, None)]),
    ("t5-small, bf16", ["--shape", "t5-small", "--dtype", "bf16"], [([], 1.5, None)]),
    ("tiny, bf16", ["--shape", "tiny", "--dtype", "bf16"], [([], 1.2, 0.3), (["--compile"], None, None)]),
]
# Growth of the cost of distill: each series varies one dimension of a shape.
GROWTH = [
    ("length", "tiny", [["--length", str(n), "--batch", str(4096 // n)] for n in (256, 512, 1024, 2048, 4096)]),
    ("batch", "tiny", [["--batch", str(n)] for n in (1, 2, 4, 8, 16)]),
    ("vocabulary", "tiny", [["--vocabulary", str(n)] for n in (8192, 16384, 32768, 65536, 131072, 262144)]),
    ("135M, vocabulary", "135m", [["--vocabulary", str(n)] for n in (49152, 131072, 262144)]),
]


def run(command):
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def spread(values):
    return f"{min(values):7.0f} {statistics.median(values):7.0f} {max(values):7.0f}"


def has_bf16():
    with open("/proc/cpuinfo") as info:
        return "avx512_bf16" in info.read()


def table(options):
    missed = []
    cases = CASES + (BF16_CASES if has_bf16() or options.bf16 else [])
    if options.quick:
        cases = [case for case in cases if case[0].startswith("tiny") and "compiled" not in case[0]]
        options.rounds = 1
    if options.cases:
        cases = [case for case in cases if case[0] in options.cases.split(";")]
    print(f"{'':34}{'tokens/s: min median max':>24}{'peak MiB':>10}{'speed':>8}{'memory':>8}{'net':>7}")
    for label, arguments, peers in cases:
        arguments = arguments + ["--steps", str(options.steps)]
        contestants = [[options.program, *arguments]]
        contestants += [[sys.executable, __file__, "step", *arguments, *more] for more, _, _ in peers]
        speeds, peaks, imports = ([[] for _ in contestants] for _ in range(3))
        for number in range(options.rounds):
            for index, command in enumerate(contestants):
                result = run(command)
                speeds[index].append(statistics.median(result["tokens_per_s"]))
                peaks[index].append(result["peak_mib"])
                imports[index].append(result.get("imports_mib", 0))
        print(f"{label + ', distill':34}{spread(speeds[0]):>24}{statistics.median(peaks[0]):10.0f}", flush=True)
        for index, (more, speed_aim, memory_aim) in enumerate(peers, 1):
            speed = statistics.median(speeds[0]) / statistics.median(speeds[index])
            peak = statistics.median(peaks[index])
            memory = statistics.median(peaks[0]) / peak
            net = statistics.median(peaks[0]) / (peak - statistics.median(imports[index]))
            name = " ".join(["  PyTorch", *more])
            print(f"{name:34}{spread(speeds[index]):>24}{peak:10.0f}{speed:7.2f}x{memory:7.2f}x{net:6.2f}x", flush=True)
            if speed_aim and speed < speed_aim:
                missed.append(f"{label}: {speed:.2f} x PyTorch's speed (aim: {speed_aim})")
            if memory_aim and memory > memory_aim:
                missed.append(f"{label}: {memory:.2f} x PyTorch's memory (aim: {memory_aim})")
    if not options.quick and not options.cases:
        print("\nHow the cost grows (tiny shape, or 135M where named; distill only):")
        for what, shape, settings in GROWTH:
            for setting in settings:
                result = run([options.program, "--shape", shape, "--steps", "3", *setting])
                speed = statistics.median(result["tokens_per_s"])
                print(f"  {what + ' ' + setting[1]:28}{speed:10.0f} tokens/s{result['peak_mib']:10.0f} MiB", flush=True)
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if missed and options.check else 0


def main():
    parser = argparse.ArgumentParser()
    roles = parser.add_subparsers(dest="role", required=True)
    peer = roles.add_parser("step")
    peer.add_argument("--shape", default="135m", choices=SHAPES)
    peer.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    peer.add_argument("--device", default="cpu")
    for name, default in [("batch", 0), ("length", 0), ("source", 512), ("vocabulary", 0), ("k", 20), ("steps", 5),
                          ("threads", 2), ("lora", 0)]:
        peer.add_argument(f"--{name}", type=int, default=default)
    peer.add_argument("--prompt", type=float, default=0)
    for name in ["checkpoint", "skip-prompt", "compile"]:
        peer.add_argument(f"--{name}", action="store_true")
    driver = roles.add_parser("table")
    driver.add_argument("program")
    driver.add_argument("--rounds", type=int, default=5)
    driver.add_argument("--steps", type=int, default=3)
    driver.add_argument("--cases", default="")
    for name in ["quick", "check", "bf16"]:
        driver.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(table(options) if options.role == "table" else step(options))


if __name__ == "__main__":
    main()
