#!/usr/bin/env bash
# Soak test of tests/nightly.sh: a long harvest against `distill serve --mock`. Its memory, threads and open files must
# not grow.
#
# usage: tests/soak.sh [REQUESTS] [SECONDS] [none|zstd]      (default: 100000 900 none)
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/serving.sh
requests=${1:-100000}
seconds=${2:-900}
compression=${3:-none}
distill=$PWD/${DISTILL:-target/release/distill}
unset DISTILL
scratch=$(mktemp -d)
cd "$scratch"

cat > mock.toml << END
[answers]
tokens = [20, 200]
latency_s = [0.02, 0.3]
[[faults]]
kind = "http 500"
share = 0.01
[[faults]]
kind = "reset in body"
share = 0.005
END
seq "$requests" | sed 's/^/tell me about the number /' > prompts.txt
trap 'kill "${server:-}" "${harvest:-}" 2> /dev/null || true; rm -rf "$scratch"' EXIT
serve --mock mock.toml
cat > run.toml << END
run_dir = "run"
[teacher]
base_url = "$url"
model = "mock"
api_key_env = ""
[prompts]
source = "prompts.txt"
[sampling]
max_tokens = 256
[limits]
requests_per_minute = $((requests * 60 / seconds))
concurrency = 64
[cache]
compression = "$compression"
END

"$distill" harvest -c run.toml --json > summary.json 2> harvest.err &
harvest=$!
pause=$(awk "BEGIN { print $seconds / 60 }")
while kill -0 "$harvest" 2> /dev/null; do
    {
        awk '/^VmRSS/ { printf "%d ", $2 } /^Threads/ { printf "%d ", $2 }' "/proc/$harvest/status"
        find "/proc/$harvest/fd" -mindepth 1 | wc -l
    } >> samples 2> /dev/null || true
    sleep "$pause"
done
wait "$harvest"
harvest=
"$distill" cache verify -c run.toml
test "$("$distill" cache stats -c run.toml --json | sed 's/.*"stats":{"records":\([0-9]*\).*/\1/')" = "$requests"

# Compares the maxima of the second quarter of the run, after the warm-up, with those of the last quarter.
awk -v compression="$compression" '
    NF == 3 { memory[++n] = $1; threads[n] = $2; files[n] = $3 }
    function most(of, from, to,  i, high) { for (i = from; i <= to; i++) if (of[i] > high) high = of[i]; return high }
    END {
        quarter = int(n / 4)
        if (quarter < 3) { print "too few samples: " n; exit 1 }
        warm = most(memory, quarter, 2 * quarter); late = most(memory, n - quarter, n - 1)
        printf "%s: memory %.1f MiB, later %.1f MiB (%+.1f %%); threads %d, later %d; open files %d, later %d\n", compression,
            warm / 1024, late / 1024, (late / warm - 1) * 100, most(threads, quarter, 2 * quarter),
            most(threads, n - quarter, n - 1), most(files, quarter, 2 * quarter), most(files, n - quarter, n - 1)
        if (late > warm * 1.05) { print "memory grows"; exit 1 }
        if (most(threads, n - quarter, n - 1) > most(threads, quarter, 2 * quarter)) { print "threads grow"; exit 1 }
        if (most(files, n - quarter, n - 1) > most(files, quarter, 2 * quarter) + 8) { print "open files grow"; exit 1 }
    }' samples
