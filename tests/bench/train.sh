#!/usr/bin/env bash
# Times training steps beside PyTorch and transformers, in turn: speed and peak memory.
#
#     tests/bench/train.sh [--quick] [--check] [--rounds N] [--cases "NAME;NAME"] [--bf16]
#
# --quick runs one round of the tiny shape. --check exits with status 1 and names each result that misses its aim. bf16
# is timed if the CPU has instructions for it, or with --bf16. Speeds are tokens/s of whole steps (forward, backward,
# clipping, AdamW). "net" is the memory ratio without the memory of PyTorch's imports. DISTILL_BENCH_PYTHON is the path
# of a Python with the packages of train-requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/train/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/train
    "$python" -m pip install --quiet --disable-pip-version-check -r tests/bench/train-requirements.txt
fi
cargo build --locked --release --quiet --example train
exec "$python" tests/bench/train.py table target/release/examples/train "$@"
