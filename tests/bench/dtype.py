"""Compares training in bf16 with training in f32, on the demo's student with 3 seeds each.

usage: dtype.py DISTILL DEMO_DIR [--seeds N] [--steps N] [--check]

Trains the student of `DEMO_DIR/kl.toml` (written by `distill demo`) in f32 and in bf16 with the same
seeds, and prints mean, minimum and maximum over the seeds. --check exits with status 1 if the
difference between bf16 and f32 exceeds the range of f32 over the seeds. The script runs on any CPU:
without bf16 instructions, the same values are rounded in software.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

# Number of steps over which the training loss is averaged.
WINDOW = 100


def train(options, dtype, seed):
    """Trains a student; returns the training loss of each step and the means of the last validation."""
    run = options.demo / "dtype" / f"{dtype}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    settings = {"train.dtype": dtype, "train.seed": seed, "train.steps": options.steps,
                "train.eval_every": 0, "train.checkpoint_every": 0, "run_dir": run.resolve()}
    command = [options.distill, "train", "-c", str(options.demo / "kl.toml")]
    for name, value in settings.items():
        command += ["--set", f"{name}={json.dumps(str(value)) if isinstance(value, (str, Path)) else value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(run / "metrics.jsonl")]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return losses, lines[-1]["means"]


def show(values):
    return f"{statistics.mean(values):8.4f} ({min(values):.4f} to {max(values):.4f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("distill")
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    runs = {dtype: [] for dtype in ("f32", "bf16")}
    for seed in range(options.seeds):
        for dtype in runs:
            runs[dtype].append(train(options, dtype, seed))
    missed = []
    print(f"{'':32}{'f32':>28}{'bf16':>28}{'difference':>12}{'seeds':>9}")
    window = min(WINDOW, options.steps)
    rows = {f"training loss, steps to {end}": lambda run, end=end: statistics.mean(run[0][end - window:end])
            for end in sorted({window, max(window, options.steps // 2), options.steps})}
    rows["validation cross-entropy"] = lambda run: run[1]["ce"]
    rows["validation KL to the teacher"] = lambda run: run[1]["kl"]
    for name, value in rows.items():
        f32, bf16 = ([value(run) for run in runs[dtype]] for dtype in ("f32", "bf16"))
        difference = statistics.mean(bf16) - statistics.mean(f32)
        spread = max(f32) - min(f32)
        print(f"{name:32}{show(f32):>28}{show(bf16):>28}{difference:+12.4f}{spread:9.4f}", flush=True)
        # A single seed has no spread.
        if options.seeds > 1 and abs(difference) > spread:
            missed.append(f"{name}: bf16 differs by {difference:+.4f}, the f32 seeds by up to {spread:.4f}")
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
