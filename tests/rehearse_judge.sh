#!/usr/bin/env bash
# Rehearses on-policy training of the release binary, scored by an endpoint: with both APIs, killed and resumed, stopped
# by Ctrl-C, and out of budget.
#
#     tests/rehearse_judge.sh DEMO_DIR [BASE_URL MODEL]
#
# DEMO_DIR is the folder of a finished `distill demo`. Its teacher scores the answers. Training starts from its student
# without soft labels. The script serves the teacher itself, unless another server offers it as MODEL at BASE_URL:
#
#     vllm serve demo/teacher --served-model-name teacher --max-model-len 512 --dtype float32
#     tests/rehearse_judge.sh demo http://127.0.0.1:8000/v1 teacher
set -euo pipefail
demo=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
distill=$PWD/${DISTILL:-target/release/distill}
source tests/serving.sh
scratch=$(mktemp -d)
cd "$scratch"
trap 'kill "${server:-}" "${victim:-}" 2> /dev/null || true; rm -rf "$scratch"' EXIT
url=${2:-}
model=${3:-teacher}
if [ -z "$url" ]; then
    serve --model "$demo/teacher" --name "$model"
fi

# config NAME JUDGE DOLLARS STEPS
config() {
    cat > "$1.toml" << END
run_dir = "$1"
[teacher]
base_url = "$url"
model = "$model"
api_key_env = ""
[price]
input = 0.4
output = 1.6
as_of = "2026-11-22"
[budget]
usd = $3
[data]
cache = "$demo/harvest/cache"
validation_share = 0.05
[student]
init = "pretrained"
path = "$demo/ce/student"
[loss]
kd = "tail"
[train]
steps = $4
batch_size = 16
micro_batch_size = 16
learning_rate = 5e-4
warmup_steps = 5
eval_every = 0
checkpoint_every = 4
dtype = "f32"
on_policy = true
[on_policy]
judge = "$2"
tokenizer = "$demo/teacher"
share = 0.5
max_tokens = 48
END
}

for judge in prompt_logprobs echo; do
    echo "-- scored by $judge"
    config "$judge" "$judge" 1 12
    "$distill" train -c "$judge.toml"
    "$distill" cache verify --dir "$judge/judged/cache"
done

echo "-- killed between two checkpoints, and resumed"
config whole prompt_logprobs 1 30
config killed prompt_logprobs 1 30
"$distill" train -c whole.toml
"$distill" train -c killed.toml > /dev/null 2>&1 &
victim=$!
until grep -q '"step":10,' killed/metrics.jsonl 2> /dev/null; do kill -0 "$victim"; sleep 0.02; done
kill -9 "$victim"
wait "$victim" 2> /dev/null || true
"$distill" train -c killed.toml --resume
# Everything except the speed.
diff <(sed 's/,"tokens_per_s.*//' whole/metrics.jsonl) <(sed 's/,"tokens_per_s.*//' killed/metrics.jsonl)
cmp whole/student/model.safetensors killed/student/model.safetensors
sha256sum {whole,killed}/student/model.safetensors
test "$(wc -l < whole/judged/cache/responses.jsonl)" = "$(wc -l < killed/judged/cache/responses.jsonl)"

echo "-- stopped by Ctrl-C during a wait for a rate limit"
config stopped prompt_logprobs 1 30
sed -i 's/^\[price\]/[limits]\nrequests_per_minute = 240\n[price]/' stopped.toml
"$distill" train -c stopped.toml 2> stopped.err &
victim=$!
until grep -q '"step":2,' stopped/metrics.jsonl 2> /dev/null; do kill -0 "$victim"; sleep 0.02; done
kill -INT "$victim"
code=0
wait "$victim" || code=$?
test "$code" = 130
grep "resume with --resume" stopped.err
test "$(ls stopped/checkpoints)" = "step-$(printf %06d "$(wc -l < stopped/metrics.jsonl)")"

echo "-- a budget that is too small"
config poor prompt_logprobs 0.002 30
code=0
"$distill" train -c poor.toml || code=$?
test "$code" = 4
ls poor/checkpoints
