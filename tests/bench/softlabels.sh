#!/usr/bin/env bash
# The proof: what each treatment of a top-k brings a student, beside the answers alone and the teacher's whole
# distributions; and a student with another tokenizer.
#
#     tests/bench/softlabels.sh [--quick] [--check] [--seeds N] [--steps N]
#
# The text is a grammar of known probabilities and the documentation of our own dependencies, read from cargo's folder.
# --quick goes through it once, in small; --check exits 1 and names the claim of the README that does not hold. The whole
# of it also draws tests/bench/softlabels.svg. DISTILL_BENCH_PYTHON names a Python that has `tokenizers`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/softlabels/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/softlabels
    "$python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.1
fi
cargo build --locked --release --quiet
exec env -u DISTILL_BENCH_PYTHON "$python" -B tests/bench/softlabels.py target/release/distill target/softlabels --svg tests/bench/softlabels.svg "$@"
