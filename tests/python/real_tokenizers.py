"""Compares `distill` with transformers on the tokenizers of real models.

usage: python real_tokenizers.py DISTILL FOLDER      (FOLDER/models/NAME/tokenizer.json, see real_tokenizers.sh)

Prints each difference, and exits with 1 if there is one.
"""

import http.server
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import unicodedata

from tokenizers import Tokenizer
from transformers import AutoTokenizer

FAMILIES = ["qwen3", "gemma3", "llama3_1", "gpt4o", "deepseek_v3"]

# Chat template for tokenizers without one.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

TEXTS = [
    "The capital of France is Paris.",
    "  leading,   inner \t and trailing white space \n\n\n",
    "fn main() {\n    println!(\"{}\", 1_000_000.0f64);\n}\n",
    "Größe, naïve café, Ærøskøbing, İstanbul",
    "東京都の人口は約1,400万人です。 中国 한국어 ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200d\ufeff",
    "1234567890 3.14159 -42 0x7f 12:34:56",
    "don't you've I'LL O'Brien's",
    "<think>\nHm.\n</think>\n\nNo.",
    "<tool_call>{\"name\": \"f\"}</tool_call>",
    "\r\n\r\n a\u00a0b\u3000c\u2028d",
    "https://example.com/a?b=c&d=%20#e",
    "x" * 300 + " " * 70 + "\n" * 9,
]

CONVERSATIONS = [
    [("user", "Say hello."), ("assistant", "Hello!")],
    [("user", "What is 2+2?"), ("assistant", "4"), ("user", "And 3+39?"), ("assistant", "42.")],
    [("system", "Be kind."), ("user", "Grüß Gott 🙂"), ("assistant", "  Grüß dich!\n")],
    [("user", "Code"), ("assistant", "```rust\nfn main() {}\n```")],
    [("user", "東京"), ("assistant", "日本の首都です。")],
]

ANSWERS = [
    "The capital of France is Paris, and its population is about 2,100,000.",
    "Größe: 3.14 m. Das ist naïve, aber schön.",
    "fn main() {\n    let x = vec![1, 2, 3];\n    println!(\"{x:?}\");\n}",
    "東京都の人口は約1,400万人です。",
    "First, boil the water. Then add salt, pasta and (if you like) a little oil 🙂.",
    '{"name": "Ann", "age": 30, "tags": ["a", "b"], "ok": true}',
]

# Minimum share of positions with soft labels if teacher and student have the same tokenizer.
MIN_SHARE = 0.95

failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
        print("FAIL", what)


def run(arguments, **options):
    done = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", **options)
    return done.returncode, done.stdout, done.stderr


def tokens(distill, model, reference):
    """Checks the ids and bytes of all texts; returns the number of texts with equal ids."""
    equal = 0
    for text in TEXTS:
        code, out, error = run([distill, "--json", "tokenize", "--model", model, "-"], input=text)
        check(code == 0, f"tokenize {model}: {error}")
        if code != 0:
            continue
        found = json.loads(out)["tokens"]
        expected = reference.encode(text, add_special_tokens=False).ids
        ids = [token["id"] for token in found]
        check(ids == expected, f"{model}: ids of {text[:40]!r}: {ids[:20]} instead of {expected[:20]}")
        spelled = [token["bytes"] for token in found]
        if all(part is not None for part in spelled):
            joined = bytes(sum(spelled, []))
            # SentencePiece may add a leading space, and Qwen composes characters.
            forms = (text, " " + text, unicodedata.normalize("NFC", text))
            fits = joined in [form.encode() for form in forms]
            check(fits, f"{model}: bytes of {text[:40]!r}: {joined[:60]!r}")
        else:
            check(False, f"{model}: a token of {text[:40]!r} has no bytes")
        equal += ids == expected
    return equal


def generation_prompt(tokenizer, reference, messages):
    """Ids of the prompt that the model continues."""
    options = {"add_generation_prompt": True, "return_dict": False}
    if not os.path.exists(os.path.join(tokenizer.name_or_path, "chat_template.jinja")):
        return tokenizer.apply_chat_template(messages, tokenize=True, **options)
    # transformers uses GPT-2's word splitting if tokenizer_config.json names GPT2Tokenizer, as for GPT-4o.
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return reference.encode(text, add_special_tokens=False).ids


def prompts(distill, folder, name, model, reference):
    """Checks that the prompt of each answer is the generation prompt, and that the end of the turn is supervised."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    place = os.path.join(folder, "prompts", name)
    os.makedirs(place, exist_ok=True)
    rows = [[{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS]
    with open(os.path.join(place, "rows.jsonl"), "w", encoding="utf-8") as file:
        for messages in rows:
            file.write(json.dumps({"messages": messages}) + "\n")
    with open(os.path.join(place, "run.toml"), "w", encoding="utf-8") as file:
        file.write(f'[student]\npath = "{os.path.abspath(model)}"\n[data]\nsource = "rows.jsonl"\n')
    code, out, error = run(
        [distill, "--json", "data", "show", "-c", os.path.join(place, "run.toml"), "--limit", "100"]
    )
    check(code == 0, f"data show {name}: {error}")
    if code != 0:
        return 0, 0, 0
    equal, ended, answers = 0, 0, 0
    for example in json.loads(out)["examples"]:
        line, _, message = example["key"].partition(":")
        messages = rows[int(line) - 1]
        # Spans of supervised tokens, one per answer.
        spans, ids = [], [token["id"] for token in example["tokens"]]
        for at, token in enumerate(example["tokens"]):
            if token["is_supervised"] and (not spans or spans[-1][1] != at):
                spans.append([at, at + 1])
            elif token["is_supervised"]:
                spans[-1][1] = at + 1
        last = int(message) if message else len(messages) - 1
        places = [at for at in range(last + 1) if messages[at]["role"] == "assistant"]
        for (start, end), at in zip(spans, places[-len(spans) :]):
            expected = generation_prompt(tokenizer, reference, messages[:at])
            answers += 1
            equal += ids[:start] == expected
            check(ids[:start] == expected, f"{name}: prompt of {example['key']}, message {at}")
            is_ended = example["tokens"][end - 1]["is_special"]
            ended += is_ended
            check(is_ended, f"{name}: no end of turn after {example['key']}, message {at}")
    return equal, ended, answers


class Teacher:
    """An endpoint that returns the tokens of its answers, with four alternatives."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.random = random.Random(1)
        size = tokenizer.get_vocab_size()
        texts = (self.text([self.random.randrange(size)]) for _ in range(4000))
        self.others = sorted({text for text in texts if text and "\ufffd" not in text})

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self, answer):
        """Bytes that each token adds to the text before it."""
        ids = self.tokenizer.encode(answer, add_special_tokens=False).ids
        whole = answer.encode()
        pieces, at, start = [], 0, 0
        for end in range(1, len(ids) + 1):
            text = self.text(ids[start:end])
            if "\ufffd" in text:
                continue
            # The bytes of a character that several tokens share are assigned to the first one.
            length = len(text.encode())
            if start == 0 and not whole.startswith(text.encode()):
                length = len(text.lstrip().encode())
            pieces.append(whole[at : at + length])
            pieces.extend(b"" for _ in range(end - start - 1))
            at, start = at + length, end
        assert at == len(whole), (answer, pieces)
        return pieces

    def reply(self, body):
        answer = ANSWERS[int(body["messages"][-1]["content"].split()[-1]) % len(ANSWERS)]
        content = []
        for piece in self.pieces(answer):
            text = piece.decode("utf-8", "replace")
            first = 0.8 + 0.1 * self.random.random()
            rest = (1 - first) / 5
            others = [word for word in self.random.sample(self.others, 6) if word != text][:4]
            entry = {"token": text, "logprob": math.log(first), "bytes": list(piece)}
            alternatives = [
                {"token": word, "logprob": math.log(rest), "bytes": list(word.encode())}
                for word in others
            ]
            content.append({**entry, "top_logprobs": [entry, *alternatives]})
        message = {"role": "assistant", "content": answer}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "stop",
            "logprobs": {"content": content},
        }
        usage = {"prompt_tokens": 10, "completion_tokens": len(content), "total_tokens": 10 + len(content)}
        return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


def serve(teacher):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = json.dumps(teacher.reply(body)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def harvest(distill, folder, name, reference):
    place = os.path.join(folder, "harvest", name)
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    with open(os.path.join(place, "prompts.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"question {number}\n" for number in range(3 * len(ANSWERS)))
    server = serve(Teacher(reference))
    with open(os.path.join(place, "run.toml"), "w", encoding="utf-8") as file:
        file.write(
            f'run_dir = "run"\n[teacher]\nbase_url = "http://127.0.0.1:{server.server_port}/v1"\n'
            'model = "m"\napi_key_env = ""\n[prompts]\nsource = "prompts.txt"\n'
            "[sampling]\nmax_tokens = 400\ntop_logprobs = 5\n"
        )
    code, _, error = run([distill, "harvest", "-c", os.path.join(place, "run.toml")])
    server.shutdown()
    check(code == 0, f"harvest {name}: {error}")
    return os.path.join(place, "run", "cache")


def share(distill, folder, cache, teacher, student):
    """Share of supervised positions with soft labels."""
    place = os.path.join(folder, "pairs", f"{teacher}-{student}")
    os.makedirs(place, exist_ok=True)
    model = os.path.abspath(os.path.join(folder, "models", student))
    # Otherwise the answer starts with an empty block of thinking, which no teacher has tokenized.
    thinking = "template_args = { enable_thinking = false }\n" if student == "qwen3" else ""
    with open(os.path.join(place, "run.toml"), "w", encoding="utf-8") as file:
        file.write(
            f'[student]\npath = "{model}"\n{thinking}'
            f'[data]\ncache = "{os.path.abspath(cache)}"\ngroups = "all"\n'
        )
    code, out, error = run(
        [distill, "--json", "data", "show", "-c", os.path.join(place, "run.toml"), "--limit", "1000"]
    )
    check(code == 0, f"data show {teacher} -> {student}: {error}")
    if code != 0:
        return 0.0
    soft = positions = 0
    for example in json.loads(out)["examples"]:
        for token in example["tokens"]:
            if token["is_supervised"] and not token["is_special"]:
                positions += 1
                soft += bool(token["soft_labels"])
                mass = sum(label["probability"] for label in token["soft_labels"])
                check(mass < 1.001, f"{teacher} -> {student}: mass {mass}")
    return soft / max(positions, 1)


def main(distill, folder):
    references = {}
    for name in FAMILIES:
        model = os.path.join(folder, "models", name)
        config = json.load(open(os.path.join(model, "tokenizer_config.json"), encoding="utf-8"))
        if "chat_template" not in config:
            with open(os.path.join(model, "chat_template.jinja"), "w", encoding="utf-8") as file:
                file.write(TEMPLATE)
        references[name] = Tokenizer.from_file(os.path.join(model, "tokenizer.json"))
        equal = tokens(distill, model, references[name])
        same, ended, answers = prompts(distill, folder, name, model, references[name])
        print(
            f"{name:12} texts {equal} of {len(TEXTS)} equal, prompts {same} of {answers} equal, "
            f"ends {ended} of {answers} supervised",
            flush=True,
        )
    caches = {name: harvest(distill, folder, name, references[name]) for name in FAMILIES}
    print("\nshare of positions with soft labels, by teacher (row) and student (column)")
    print(" " * 12, *(f"{name:>12}" for name in FAMILIES))
    for teacher in FAMILIES:
        shares = [share(distill, folder, caches[teacher], teacher, student) for student in FAMILIES]
        print(f"{teacher:12}", *(f"{100 * value:10.1f} %" for value in shares), flush=True)
        own = shares[FAMILIES.index(teacher)]
        check(own >= MIN_SHARE, f"{teacher} -> {teacher}: {own:.3f}")
    print(f"\n{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
