#!/usr/bin/env bash
# Training steps beside PyTorch and transformers, in turn: speed and peak memory.
#
#     tests/bench/train.sh [--quick] [--check] [--rounds N] [--cases "NAME;NAME"] [--bf16]
#
# --quick takes the tiny shape only, once. --check exits 1 and names what misses its aim. bf16 is timed where the CPU has
# instructions for it, or with --bf16. Speeds are tokens/s of whole steps (forward, backward, clipping, AdamW);
# "net" is the ratio of memory without what PyTorch takes to be imported. DISTILL_BENCH_PYTHON names a Python that has
# what it needs already.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/train/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/train
    "$python" -m pip install --quiet --disable-pip-version-check -r tests/bench/train-requirements.txt
fi
cargo build --locked --release --quiet --example train
exec "$python" tests/bench/train.py table target/release/examples/train "$@"
