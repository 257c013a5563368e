#!/usr/bin/env bash
# Rehearses the cache of the release binary: killed during compression, harvested in shards and merged, damaged and
# repaired, exported, and on a full disk.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=$PWD/${DISTILL:-target/release/distill}
source tests/serving.sh
unset DISTILL
scratch=$(mktemp -d)
cd "$scratch"

cat > mock.toml << 'END'
[answers]
tokens = [50, 400]
latency_s = [0.05, 0.4]
[[faults]]
kind = "http 500"
share = 0.02
END
seq 600 | sed 's/^/tell me about the number /' > prompts.txt
trap 'kill "${server:-}" "${victim:-}" 2> /dev/null || true; rm -rf "$scratch"' EXIT
serve --mock mock.toml

# config NAME COMPRESSION TOP_LOGPROBS
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
max_tokens = 512
top_logprobs = $3
[limits]
concurrency = 32
adapt = false
[cache]
compression = "$2"
END
}
records() { "$distill" cache stats -c "$1.toml" --json | sed 's/.*"stats":{"records":\([0-9]*\).*/\1/'; }

echo "-- killed during compression, and resumed"
config packed zstd 20
for seconds in 0.8 1.2; do
    "$distill" harvest -c packed.toml > /dev/null 2>&1 &
    victim=$!
    sleep "$seconds"
    kill -9 "$victim"
    wait "$victim" 2> /dev/null || true
    victim=
    echo "killed after $seconds s: $(records packed) records, $(stat -c %s packed/cache/responses.jsonl.zst) bytes in frames"
done
"$distill" harvest -c packed.toml | grep -E "cached|answered|failed|pending"
"$distill" cache verify -c packed.toml
"$distill" cache stats -c packed.toml | grep -E "^cache|bytes"
if command -v zstdcat > /dev/null; then
    test "$(zstdcat packed/cache/responses.jsonl.zst | cat - packed/cache/responses.jsonl | wc -l)" = 600
fi

echo "-- three shards, merged"
config whole none 0
for shard in 1 2 3; do
    "$distill" harvest -c whole.toml --set run_dir="shard-$shard" --shard "$shard/3" | grep "prompts x samples"
done
"$distill" cache merge -c whole.toml shard-1/cache shard-2/cache shard-3/cache
test "$(records whole)" = 600
"$distill" harvest -c whole.toml | grep -E "cached|requests sent"
"$distill" cache merge -c whole.toml shard-2/cache

echo "-- damaged, rejected, repaired, requested again"
python3 - << 'END'
with open("whole/cache/responses.jsonl", "r+b") as file:
    lines = file.readlines()
    file.seek(len(b"".join(lines[:99])) + 100)
    file.write(b"#")
END
code=0
"$distill" harvest -c whole.toml || code=$?
test "$code" = 5
"$distill" cache repair -c whole.toml
"$distill" harvest -c whole.toml | grep -E "cached|answered"
"$distill" cache verify -c whole.toml

echo "-- exported"
"$distill" cache export --to trl -c whole.toml --groups mock -o trl.jsonl
test "$(wc -l < trl.jsonl)" = 600

echo "-- a full disk that gets free space"
mkdir small
if unshare --map-root-user --mount true 2> /dev/null; then
    config full none 0
    cat > full.sh << END
mount -t tmpfs -o size=400k tmpfs small
"$distill" harvest -c full.toml --set run_dir=small/run 2> full.err > full.out &
victim=\$!
until grep -q "answers are held in memory" full.err; do kill -0 \$victim; sleep 0.1; done
before=\$(wc -l < small/run/cache/responses.jsonl)
sleep 2
kill -0 \$victim
test "\$before" = "\$(wc -l < small/run/cache/responses.jsonl)"
echo "\$before records, waiting for disk space"
mount -o remount,size=20m small
wait \$victim
grep -E "answered|failed|pending|requests sent" full.out
"$distill" cache verify --dir small/run/cache
END
    unshare --map-root-user --mount bash -euo pipefail full.sh || { cat full.err; exit 1; }
    cat full.err
else
    echo "skipped: no mount namespace"
fi
