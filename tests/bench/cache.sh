#!/usr/bin/env bash
# Times the opening of a cache of a million records, and measures the bytes per answer token with top-20 logprobs.
#
#     tests/bench/cache.sh [--quick] [--check] [DEMO_DIR]
#
# The files are in the page cache, so the times do not depend on the disk. With DEMO_DIR (a finished `distill demo`),
# the demo's prompts are harvested again from its teacher, without and with compression; only this measures the bytes
# per token. --check exits with status 1 and names each result that misses its aim.
set -euo pipefail
cd "$(dirname "$0")/../.."
records=1000000 rounds=5 check= demo=
for argument in "$@"; do
    case $argument in
        --quick) records=100000 rounds=3 ;;
        --check) check=1 ;;
        *) demo=$argument ;;
    esac
done
# Two builds: in one build with an example, the program would get the features of the tests' dependencies.
cargo build --locked --release --quiet --example cache
cargo build --locked --release --quiet --bin distill
cache=target/release/examples/cache
distill=target/release/distill
folder=$(mktemp -d "$PWD/target/bench-cache.XXXXXX")
trap 'rm -rf "$folder"; [ -z "${server:-}" ] || kill "$server"' EXIT
missed=

# number NAME JSON: the number with this name.
number() { sed "s/.*\"$1\":\([0-9.]*\).*/\1/" <<< "$2"; }
median() { sort -n | awk '{ v[NR] = $1 } END { print (NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2) }'; }
# miss TEXT CONDITION: adds the text to the missed aims if the condition (awk) is true.
miss() { if awk "BEGIN { exit !($2) }"; then missed+="$1"$'\n'; fi; }

# measure FILE COMMAND: seconds and peak MiB of a command that writes to FILE.
measure() {
    python3 -c 'import resource, subprocess, sys, time
start = time.monotonic()
subprocess.run(sys.argv[2:], check=True, stdout=open(sys.argv[1], "w"))
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)' "$@"
}

# row LABEL DIR THREADS INDEX: times the opening of the cache in DIR and sets seconds, peak and rate. THREADS is 0 for
# all cores. INDEX is keep (opens with the index) or none (deletes the index first).
row() {
    local times=() peaks=() out bytes=0
    for ((round = 0; round <= rounds; round++)); do
        [ "$4" = keep ] || rm -f "$2/responses.index"
        out=$(RAYON_NUM_THREADS=$3 "$cache" open "$2")
        test "$(number records "$out")" = "$records"
        [ "$round" = 0 ] || { times+=("$(number seconds "$out")"); peaks+=("$(number peak_mib "$out")"); }
        bytes=$(number bytes_read "$out")
    done
    seconds=$(printf '%s\n' "${times[@]}" | median)
    peak=$(printf '%s\n' "${peaks[@]}" | median)
    rate=$(awk "BEGIN { printf \"%.2f\", $bytes / $seconds / 1e9 }")
    [ "$bytes" = 0 ] && shown="-" || shown="$rate GB/s"
    printf '%-34s %7.2f s %6d MiB %13s\n' "$1" "$seconds" "$peak" "$shown"
}

echo "$records records of $("$cache" make "$folder/plain" "$records" && stat -c %s "$folder/plain/responses.jsonl") bytes; medians of $rounds rounds"
printf '%-34s %9s %10s %13s\n' "" time peak read
row "by its index" "$folder/plain" 0 keep
miss "by its index: $seconds s (aim: under 5)" "$seconds >= 5"
miss "by its index: $peak MiB (aim: under 200)" "$peak >= 200"
mkdir "$folder/run"
mv "$folder/plain" "$folder/run/cache"
printf 'question %d\n' $(seq 1000) > "$folder/prompts.txt"
cat > "$folder/dry.toml" << 'END'
[teacher]
base_url = "http://127.0.0.1:9/v1"
model = "teacher-1"
api_key_env = ""
[prompts]
source = "prompts.txt"
END
times=() peaks=()
for ((round = 0; round <= rounds; round++)); do
    read -r seconds peak < <(measure "$folder/dry.out" "$distill" harvest --dry-run -c "$folder/dry.toml")
    [ "$round" = 0 ] || { times+=("$seconds"); peaks+=("$peak"); }
done
grep -q "of the first 20,000 records" "$folder/dry.out" || [ "$records" -le 20000 ]
seconds=$(printf '%s\n' "${times[@]}" | median)
peak=$(printf '%s\n' "${peaks[@]}" | median)
printf '%-34s %7.2f s %6d MiB %13s\n' "harvest --dry-run, 1,000 prompts" "$seconds" "$peak" -
miss "dry run: $seconds s (aim: under 1)" "$seconds >= 1"
miss "dry run: $peak MiB (aim: under 200)" "$peak >= 200"
mv "$folder/run/cache" "$folder/plain"
row "whole, one core" "$folder/plain" 1 none
miss "whole, one core: $rate GB/s (aim: 1)" "$rate < 1"
row "whole, $(nproc) cores" "$folder/plain" 0 none
miss "whole: $peak MiB (aim: under 200)" "$peak >= 200"
rm -rf "$folder/plain"
"$cache" make "$folder/zstd" "$records" 0 zstd
row "compressed, whole, $(nproc) cores" "$folder/zstd" 0 none
rm -rf "$folder/zstd"

if [ -n "$demo" ]; then
    coproc teacher { exec "$distill" serve --model "$demo/teacher" --port 0 --name teacher --batch-size 64; }
    server=$teacher_PID
    read -r _ _ url <&"${teacher[0]}"
    for compression in none zstd; do
        "$distill" harvest -c "$demo/harvest.toml" --json --set run_dir="$folder/$compression" \
            --set teacher.base_url="$url" --set cache.compression="$compression" > /dev/null
        "$distill" cache verify --dir "$folder/$compression/cache" > /dev/null
        stats=$("$distill" cache stats --dir "$folder/$compression/cache" --json)
        tokens=$(sed 's/.*"logprobs":{[^}]*"tokens":\([0-9]*\).*/\1/' <<< "$stats")
        bytes=$(sed 's/.*"dir":"[^"]*","bytes":\([0-9]*\).*/\1/' <<< "$stats")
        each=$(awk "BEGIN { printf \"%.0f\", $bytes / $tokens }")
        alone=$(number logprob_bytes_per_token "$stats")
        printf 'cache of the demo, %s: %d bytes, %d per token of %d' "$compression" "$bytes" "$each" "$tokens"
        if [ "$compression" = none ]; then
            printf ', logprobs alone %.0f (as sent by the API: %.0f)\n' "$alone" "$(number openai_bytes_per_token "$stats")"
            miss "plain logprobs: $alone bytes per token (aim: under 450)" "$alone >= 450"
        else
            printf ', with all other fields\n'
            miss "compressed: $each bytes per token (aim: under 130)" "$each >= 130"
        fi
    done
fi
if [ -n "$check" ] && [ -n "$missed" ]; then
    printf 'missed:\n%s' "$missed" >&2
    exit 1
fi
