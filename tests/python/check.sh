#!/usr/bin/env bash
# Checks our files and our server with other programs, in a Python environment under target/.
#
# usage: tests/python/check.sh [DEMO_DIR [PARQUET_DISTILL]]
#
# DEMO_DIR is the folder of a finished `distill demo` (default: demo). PARQUET_DISTILL is a distill binary
# with the feature `parquet`; without it the check of the Parquet export is skipped.
#
# 1. transformers loads a student, its teacher and a student of each architecture. Logits agree within 1e-3, and
#    greedy texts are equal.
# 2. datasets and jq read the cache directly.
# 3. datasets, openai, TRL, axolotl, pyarrow, pandas and duckdb read the files of `distill cache export`.
# 4. The official openai client uses `distill serve`.
# 5. transformers 5 and 4 load encoder-decoders of distill: equal tensors, logits, greedy texts and logprobs.
set -euo pipefail
cd "$(dirname "$0")/../.."
demo=${1:-demo}
parquet_distill=${2:-}
distill=target/release/distill
environment=target/python

for needed in "$distill" "$demo/kl/student/config.json"; do
    if [ ! -e "$needed" ]; then
        echo "$needed is missing: run 'cargo run --release -- demo' first" >&2
        exit 2
    fi
done
# Installed without dependencies: axolotl pins the versions of many packages, gradio and cloud file systems
# among them. The packages that its KD plugin imports are in requirements.txt.
axolotl="axolotl>=0.19,<0.20"
wanted="$(cat tests/python/requirements.txt) $axolotl"
if [ "$(cat "$environment/ready" 2> /dev/null)" != "$wanted" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet -r tests/python/requirements.txt
    "$environment/bin/pip" install --quiet --no-deps "$axolotl"
    printf '%s' "$wanted" > "$environment/ready"
fi
python=$environment/bin/python
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1

for model in kl/student teacher; do
    echo "== transformers: $model"
    "$python" tests/python/transformers_check.py "$distill" "$demo/$model" "$demo/test.jsonl"
done

echo "== transformers: a student of each architecture, initialised by transformers and trained by distill"
students=target/architectures
"$python" tests/python/architectures.py "$distill" "$demo" "$students"
for student in "$students"/*/{full,lora}/student; do
    if [ -e "$student" ]; then
        echo "-- $student"
        "$python" tests/python/transformers_check.py "$distill" "$student" "$demo/test.jsonl" 5
    fi
done

echo "== transformers 5 and 4: encoder-decoders"
# Version 4 uses the environment's PyTorch. These are its packages of other versions, and those that version 5 dropped.
transformers4=target/transformers4
wanted4="transformers==4.57.6 tokenizers>=0.22,<=0.23 huggingface_hub>=0.34,<1 requests charset_normalizer idna urllib3 certifi"
if [ "$(cat "$transformers4/ready" 2> /dev/null)" != "$wanted4" ]; then
    rm -rf "$transformers4"
    # shellcheck disable=SC2086 # one argument per package
    "$environment/bin/pip" install --quiet --target "$transformers4" --no-deps $wanted4
    printf '%s' "$wanted4" > "$transformers4/ready"
fi
for path in "" "$transformers4"; do
    PYTHONPATH="$path" "$python" tests/python/t5.py "$distill" target/t5
done

echo "== datasets: reads the cache directly"
"$python" tests/python/load_cache.py "$demo/harvest/cache/responses.jsonl"

if command -v jq > /dev/null; then
    echo "== jq: reads the cache directly"
    jq -r '[.prompt_id, .answer.text, (.logprobs.token | length)] | @tsv' \
        "$demo/harvest/cache/responses.jsonl" | tail -n 2
fi

echo "== exports, read by their target tools"
"$python" tests/python/exports.py "$distill" "$demo" ${parquet_distill:+"$parquet_distill"}

echo "== the openai client against distill serve"
coproc server { exec "$distill" serve --model "$demo/teacher" --port 0 --name teacher; }
trap 'kill "${server_PID:-}" 2>/dev/null || true' EXIT
read -r _ _ base_url <&"${server[0]}"
"$python" tests/python/openai_client.py "$base_url"
