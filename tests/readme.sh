#!/usr/bin/env bash
# Checks the commands and configs of the README against the program.
#
# usage: tests/readme.sh DEMO_DIR      (the folder of a finished `distill demo`)
#
# Every ```toml block must be a valid config. Every `distill` command in a ```sh block must parse:
# it is run with --help, which fails for unknown commands and flags. Commands that read a finished
# demo are run on DEMO_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=$1
distill=target/release/distill
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

awk -v dir="$scratch" '
    /^```toml$/ { file = dir "/" ++n ".toml"; inside = 1; next }
    /^```$/ { inside = 0 }
    inside { print > file }
' README.md
for config in "$scratch"/*.toml; do
    "$distill" config show -c "$config" > /dev/null
    echo "ok: README config $(basename "$config")"
done

awk '/^```sh$/ { inside = 1; next } /^```$/ { inside = 0 } inside' README.md |
    sed -n 's/ *#.*//; s/^cargo run --release -- /distill /; s/ &$//; s/^distill //p' > "$scratch/commands"
test -s "$scratch/commands"
while IFS= read -r line; do
    eval "arguments=($line)"
    "$distill" "${arguments[@]}" --help > /dev/null || { echo "'distill $line' in README.md does not parse" >&2; exit 1; }
    echo "ok: distill $line"
done < "$scratch/commands"

"$distill" cache stats -c "$demo/harvest.toml"
"$distill" cache verify -c "$demo/harvest.toml"
"$distill" cache show -c "$demo/harvest.toml" --limit 1
"$distill" harvest -c "$demo/harvest.toml" --dry-run
"$distill" generate --model "$demo/kl/student" "remind me to call the bank at noon"
"$distill" data show -c "$demo/kl.toml" | grep -q '>>> '
"$distill" tokenize --model "$demo/teacher" "call the bank" > /dev/null
