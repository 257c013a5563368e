#!/usr/bin/env bash
# Times the preparation of a cache on two threads. Its answers have 300 tokens with top-20 logprobs.
#
#     tests/bench/prepare.sh [--quick] [--check] [RECORDS]
#
# A record takes 120 KB of disk, and its prepared example 36 KB more. The cache is read once before the
# timing, so the times do not depend on the disk if the cache fits into memory. --check exits with
# status 1 and names each result that misses its aim. The aim for the time is given for 100,000 records
# (the default) and scaled to RECORDS.
set -euo pipefail
cd "$(dirname "$0")/../.."
records=100000 check=
for argument in "$@"; do
    case $argument in
        --quick) records=5000 ;;
        --check) check=1 ;;
        *) records=$argument ;;
    esac
done
cargo build --locked --release --quiet --example prepare
prepare=target/release/examples/prepare
folder=$(mktemp -d "$PWD/target/bench-prepare.XXXXXX")
trap 'rm -rf "$folder"' EXIT
missed=

# number NAME JSON: the number with this name.
number() { sed "s/.*\"$1\":\([0-9.]*\).*/\1/" <<< "$2"; }
# miss TEXT CONDITION: adds the text to the missed aims if the condition (awk) is true.
miss() { if awk "BEGIN { exit !($2) }"; then missed+="$1"$'\n'; fi; }
threads=2

"$prepare" make "$folder" "$records"
cat "$folder"/cache/* > /dev/null
bytes=$(stat -c %s "$folder/cache/responses.jsonl")
first=$(RAYON_NUM_THREADS=$threads "$prepare" run "$folder")
second=$(RAYON_NUM_THREADS=$threads "$prepare" run "$folder")
align=$(RAYON_NUM_THREADS=1 "$prepare" align "$folder")
case $first in *'"is_new":true'*) ;; *) echo "the first run did not prepare" >&2; exit 1 ;; esac
case $second in *'"is_new":false'*) ;; *) echo "the second run prepared again" >&2; exit 1 ;; esac
test "$(number kept "$first")" = "$records"

seconds=$(number seconds "$first") cpu=$(number cpu "$first") peak=$(number peak_mib "$first")
mapped=$(number seconds "$second") mapped_peak=$(number peak_mib "$second")
tokens=$(number positions "$first") soft=$(number soft_positions "$first")
disk=$(du -sb "$folder/prepared" | cut -f1)
speed=$(awk "BEGIN { printf \"%.0f\", $tokens / $seconds / $threads }")
aligned=$(awk "BEGIN { printf \"%.0f\", $(number tokens_per_s "$align") }")
awk "BEGIN {
    printf \"%d records with %d answer tokens, %d of them with soft labels; %.2f GB of cache\n\", $records, $tokens, $soft, $bytes / 1e9
    printf \"prepared    %8.2f s %6d MiB %9.0f records/s %9.0f tokens/s on each of $threads cores, %.2f GB on disk\n\", \
        $seconds, $peak, $records / $seconds, $speed, $disk / 1e9
    printf \"            %8.1f s of processor time, loading the tokenizer included\n\", $cpu
    printf \"mapped      %8.2f s %6d MiB\n\", $mapped, $mapped_peak
    printf \"align alone %34.0f tokens/s on one core\n\", $aligned
}"
miss "prepared in $seconds s (aim: under 60 for 100,000 records)" "$seconds >= 60 * $records / 100000"
miss "$peak MiB (aim: under 500 MB)" "$peak * 1.048576 >= 500"
miss "align: $aligned tokens/s (aim: 200,000)" "$aligned < 200000"
if [ -n "$check" ] && [ -n "$missed" ]; then
    printf 'missed:\n%s' "$missed" >&2
    exit 1
fi
