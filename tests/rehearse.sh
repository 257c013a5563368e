#!/usr/bin/env bash
# Rehearses a short overnight run of the release binary against `distill serve --mock`: probe, kill, resume, exhausted
# budget, and batches. No answer may be lost.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=$PWD/${DISTILL:-target/release/distill}
source tests/serving.sh
scratch=$(mktemp -d)
cd "$scratch"

cat > mock.toml << 'END'
[answers]
tokens = [5, 40]
latency_s = [0.05, 0.3]
[limits]
requests_per_minute = 6000
tokens_per_minute = 1000000
[[faults]]
kind = "http 500"
share = 0.02
[[faults]]
kind = "reset in body"
share = 0.01
[batch]
clock = 7200.0
error_rows = 2
END
seq 600 | sed 's/^/tell me about the number /' > prompts.txt

trap 'kill "${server:-}" 2> /dev/null || true; rm -rf "$scratch"' EXIT
serve --mock mock.toml

config() {
    cat > "$1.toml" << END
run_dir = "$1"
[teacher]
base_url = "$url"
model = "mock"
api_key_env = ""
[prompts]
source = "prompts.txt"
[sampling]
max_tokens = 64
[limits]
requests_per_minute = 5000
concurrency = 32
[price]
input = 0.4
output = 1.6
as_of = "2026-11-22"
[budget]
usd = $2
[schedule]
mode = "$3"
[batch]
max_requests = 250
poll_s = 0.2
END
}

echo "-- a probe, and a harvest that is killed and resumed"
config overnight 0.5 realtime
"$distill" probe -c overnight.toml
"$distill" harvest -c overnight.toml --dry-run
"$distill" harvest -c overnight.toml > /dev/null 2>&1 &
victim=$!
sleep 2
kill -9 "$victim"
wait "$victim" 2> /dev/null || true
"$distill" harvest -c overnight.toml
"$distill" cache verify -c overnight.toml
test "$(wc -l < overnight/cache/responses.jsonl)" = 600

echo "-- a budget that is too small"
config poor 0.01 realtime
code=0
"$distill" harvest -c poor.toml || code=$?
test "$code" = 4

echo "-- the same prompts through the Batch API"
config batch 0.5 batch
"$distill" harvest -c batch.toml --dry-run
code=0
"$distill" harvest -c batch.toml || code=$?
test "$code" = 0 || test "$code" = 3
"$distill" cache verify -c batch.toml
