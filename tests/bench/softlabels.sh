#!/usr/bin/env bash
# Compares students with their teacher. They are trained with each loss on the top-k, on the answers alone, on the
# teacher's full distributions, and with another tokenizer.
#
#     tests/bench/softlabels.sh [--quick] [--check] [--resume] [--jobs N] [--seeds N] [--steps N]
#
# The text comes from a grammar with known probabilities, and from the documentation of the crates in cargo's registry
# folder. --quick runs a small version. --check exits with status 1 and names each claim of tests/bench/README.md that
# does not hold. The full version also draws tests/bench/softlabels.svg. DISTILL_BENCH_PYTHON is the path of a Python
# with `tokenizers`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/softlabels/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/softlabels
    "$python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.1
fi
cargo build --locked --release --quiet
exec env -u DISTILL_BENCH_PYTHON "$python" -B tests/bench/softlabels.py target/release/distill target/softlabels --svg tests/bench/softlabels.svg "$@"
