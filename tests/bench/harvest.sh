#!/usr/bin/env bash
# Times `distill harvest` beside a bare reqwest loop, an aiohttp loop, AsyncOpenAI and bespokelabs-curator.
#
#     tests/bench/harvest.sh [--quick] [--check] [--cases P1,P3] [--peers aiohttp] [--rounds 5] [--before DISTILL]
#
# --before measures another build of distill in the same rounds. --check exits with status 1 and names each result that
# misses its aim. The Python environment is created under target/.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Two builds: in one build with an example, the program would get the features of the tests' dependencies.
cargo build --locked --release --quiet --example bare
cargo build --locked --release --quiet --bin distill
folder=target/bench
mkdir -p "$folder"
if [ ! -x "$folder/venv/bin/python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --requirement tests/bench/requirements.txt
fi
exec "$folder/venv/bin/python" tests/bench/harvest.py --distill target/release/distill \
    --bare target/release/examples/bare --folder "$folder" "$@"
