#!/usr/bin/env bash
# Distils a T5 teacher into smaller T5 students, white-box and black-box, on question answering in SQuAD's form.
#
#     tests/bench/seed.sh [--quick] [--check] [--seeds N] [--dir DIR]
#
# Text, questions and tokenizer are generated (seed_data.py). The teacher is trained on the true answers; the students on
# the true answers, on its answers, on its whole distributions at several temperatures, and on its top-20 logprobs over
# HTTP. Prints a table with bootstrap intervals. --quick runs every row on little data. --check exits with status 1 and
# names each aim that is missed. DISTILL_BENCH_PYTHON is the path of a Python with `tokenizers`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${DISTILL_BENCH_PYTHON:-target/bench/seed/bin/python}
if ! [ -x "$python" ]; then
    python3 -m venv target/bench/seed
    "$python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.1
fi
cargo build --locked --release --quiet --bin distill
exec env -u DISTILL_BENCH_PYTHON "$python" -B tests/bench/seed.py target/release/distill "$@"
