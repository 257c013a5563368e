#!/usr/bin/env bash
# Measures the students of each loss on the top-k, beside students of the answers alone and of the teacher's full
# distributions, and students with another tokenizer.
#
#     tests/bench/softlabels.sh [--quick] [--check] [--resume] [--jobs N] [--seeds N] [--steps N]
#
# The text is a grammar with known probabilities and the documentation of our dependencies, read from cargo's folder.
# --quick runs a small version; --check exits 1 and names each claim of tests/bench/README.md that does not hold. The full
# version also draws tests/bench/softlabels.svg. DISTILL_BENCH_PYTHON is the path of a Python with `tokenizers`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/softlabels/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/softlabels
    "$python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.1
fi
cargo build --locked --release --quiet
exec env -u DISTILL_BENCH_PYTHON "$python" -B tests/bench/softlabels.py target/release/distill target/softlabels --svg tests/bench/softlabels.svg "$@"
