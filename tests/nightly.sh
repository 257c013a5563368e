#!/usr/bin/env bash
# Long versions of the CI checks: kills, signals, damage, crash images, simulated overnight runs, fuzz targets and a
# soak test.
#
# usage: tests/nightly.sh [FUZZ_SECONDS]      (per target; default 1200, about five hours in total)
#
# Fuzzing needs a nightly toolchain, and cargo-fuzz, which is installed under target/ if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
fuzz_seconds=${1:-1200}

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "kills, truncated files, flipped bits, failing disks, power losses, two processes, signals"
NIGHTLY=1 cargo test --locked --test it -- --nocapture cache kills harvest::disk budget train::resume

step "simulated overnight runs"
NIGHTS=${NIGHTS:-2000} cargo test --locked --test it -- --nocapture simulated_nights | tail -n 5

step "soak test"
cargo build --locked --release --quiet --bin distill
tests/soak.sh 100000 900 none
tests/soak.sh 100000 900 zstd

step "fuzz targets"
if ! command -v cargo-fuzz > /dev/null; then
    cargo install --quiet --root target/tools cargo-fuzz
    PATH=$PWD/target/tools/bin:$PATH
fi
mkdir -p target/fuzz-corpus
for target in cache record reply limits config prompts model; do
    echo "-- $target"
    mkdir -p "target/fuzz-corpus/$target"
    cargo +nightly fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz "$target" \
        "target/fuzz-corpus/$target" "tests/fuzz/corpus/$target" -- \
        -max_total_time="$fuzz_seconds" -max_len=20000 -rss_limit_mb=4096 -print_final_stats=1 2>&1 | tail -n 8
done

step "done"
