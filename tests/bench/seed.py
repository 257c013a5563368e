"""Trains the teacher and the students of seed.sh, asks all of them over HTTP, and prints the table.

    seed.py DISTILL [--quick] [--check] [--seeds N] [--dir DIR]

Replaces DIR, target/seed by default. Every model is served by `distill serve`, so answers per second and memory are those
of a server.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import seed_score
import seed_text

CONFIGS = Path("datasets/squad")
# Requests in flight.
CONCURRENCY = 16
# Questions of the teacher's training data from which the students are distilled.
STUDENT_ROWS = 6000
# Words that the teacher repeats at most.
MAX_COPY = 8
# Rows of the table: name, settings of student.toml, and the data.
TRUTH, ANSWERS, LOGPROBS = "data.source", "answers", "logprobs"
ROWS = [
    ("CE on the truth", TRUTH, ["loss.kd=none"]),
    ("KL + CE, T = 1", TRUTH, ["loss.temperature=1.0"]),
    ("KL + CE, T = 2", TRUTH, ["loss.temperature=2.0"]),
    ("KL + CE, T = 4", TRUTH, ["loss.temperature=4.0"]),
    ("KL + CE, T = 2, cotrain", TRUTH, ["loss.temperature=2.0", "teacher.cotrain=true", "teacher.cotrain_rate=0.2"]),
    ("black-box: CE on the teacher's answers", ANSWERS, ["loss.kd=none"]),
    ("black-box: KL + CE on its top-20 logprobs", LOGPROBS, ["loss.kd=tail"]),
]
# Steps of a student, and how many times as many the row LONG has.
STEPS, LONG_FACTOR = 130, 5
LONG = f"KL + CE, T = 2, {LONG_FACTOR} times the steps"
ALL_LAYERS = ["student.encoder_layers=4", "student.decoder_layers=3"]
HALF_WIDTH = ["student.hidden_size=128", "student.intermediate_size=384"]
SENTENCE = re.compile(r"[^.]+\.( |$)")


class Bench:
    def __init__(self, options):
        self.distill, self.dir, self.options = str(Path(options.distill).resolve()), options.dir, options
        self.data, self.test = options.dir / "data", []

    def run(self, *arguments):
        done = subprocess.run([self.distill, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")

    def generate_data(self):
        sizes = ["--train", "1500", "--test", "40", "--pieces", "1500"] if self.options.quick else []
        script = Path(__file__).with_name("seed_data.py")
        subprocess.run([sys.executable, "-B", script, self.data, *sizes], check=True, stdout=subprocess.DEVNULL)
        self.test = seed_score.read_lines(self.data / "test.jsonl")
        write_training_data(self.data)

    def train(self, name, config, settings):
        """Trains a model. Returns its folder."""
        run = self.dir / name
        settings = [f"run_dir={run.resolve()}", *settings]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        self.run("train", "-c", CONFIGS / config, *flags)
        return run / "student"

    def harvest(self, model, name, prompts):
        """Asks a served model the prompts with `distill harvest`. Returns the cache folder."""
        run = self.dir / name
        config = self.dir / f"{name}.toml"
        with self.served(model) as (address, _):
            config.write_text(f"""run_dir = {json.dumps(str(run.resolve()))}
[teacher]
base_url = {json.dumps(address)}
model = "model"
api_key_env = ""
[prompts]
source = {json.dumps(str(prompts.resolve()))}
limit = {STUDENT_ROWS}
[sampling]
temperature = {1.0 if self.options.quick else 0.0}
max_tokens = 32
top_logprobs = 20
[limits]
concurrency = {CONCURRENCY}
""")
            self.run("harvest", "-c", config)
        return run / "cache"

    @contextmanager
    def served(self, model):
        """Serves the model while the block runs. Yields the base URL and a function for the peak memory in MiB."""
        command = [self.distill, "serve", "--model", str(model), "--port", "0", "--name", "model"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

        def peak_mib():
            status = Path(f"/proc/{server.pid}/status").read_text()
            return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

        try:
            yield server.stdout.readline().removeprefix("listening on ").strip(), peak_mib
        finally:
            server.terminate()
            server.wait(timeout=30)

    def score(self, model):
        """Asks a served model the test questions. `distill harvest` would stop at the empty answers of a bad model."""
        with self.served(model) as (address, peak_mib), ThreadPoolExecutor(CONCURRENCY) as pool:
            began = time.perf_counter()
            rows = seed_score.read_lines(self.data / "test-prompts.jsonl")
            answers = dict(pool.map(lambda row: (row["id"], ask(address, row["messages"])), rows))
            seconds = time.perf_counter() - began
            memory = peak_mib()
        size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        return seed_score.summary(self.test, answers) | {
            "parameters": parameters(model), "mb": size / 1e6, "answers_per_s": len(answers) / seconds, "mib": memory}


def ask(address, messages):
    body = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 32}
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def conversation(identity, prompt, answer):
    """Returns a row of training data."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": identity, "messages": messages}


def write_training_data(data):
    """Writes the training data of the teacher and of the students (student.jsonl, the first questions). A T5 with random
    weights cannot copy, and does not learn it from answers of three tokens: it first repeats parts of passages
    (copy.jsonl). Then it answers questions (teacher.jsonl) about passages, about the sentence that holds the answer, and
    about that sentence with `what` in place of the answer."""
    source = random.Random(1)
    copies, questions = [], []
    for row in seed_score.read_lines(data / "train.jsonl"):
        identity, context, question = row["id"], row["context"], row["question"]
        answer, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        sentence = next(m for m in SENTENCE.finditer(context) if m.start() <= start < m.end() or m.end() == len(context))
        blank = (context[sentence.start():start] + "what" + context[start + len(answer):sentence.end()]).strip(" .") + "?"
        alone = sentence.group().strip()
        for about, asked in [(context, question), (alone, question), (alone, blank)]:
            prompt = seed_text.PROMPT.format(context=about, question=asked)
            questions.append(conversation(identity, prompt, answer))
        words = context.split()
        length = source.randint(1, MAX_COPY)
        first = source.randrange(max(1, len(words) - length))
        part = " ".join(words[first:first + length])
        copies.append(conversation(identity, f"Repeat: {part}", part))
    students = seed_score.read_lines(data / "train-truth.jsonl")[:STUDENT_ROWS]
    for name, rows in [("copy", copies), ("teacher", questions), ("student", students)]:
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parameters(model):
    with open(Path(model) / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def print_row(name, results):
    def interval(key):
        low, high = (statistics.mean(r[f"{key}_interval"][side] for r in results) for side in (0, 1))
        return f"{100 * mean(key):5.1f} ({100 * low:.1f}-{100 * high:.1f})"

    def mean(key):
        return statistics.mean(result[key] for result in results)

    f1 = [100 * result["f1"] for result in results]
    spread = f"{max(f1) - min(f1):.1f}" if len(f1) > 1 else "-"
    print(f"| {name} | {mean('parameters') / 1e6:.2f} | {mean('mb'):.0f} | {interval('exact')} | {interval('f1')} | {spread} "
          f"| {interval('rouge_l')} | {mean('answers_per_s'):.0f} | {mean('mib'):.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("distill")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("target/seed"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.dir = 1, options.dir.with_name(f"{options.dir.name}-quick")
    if options.dir.exists():
        # The models of an earlier run may have had other settings.
        if not (options.dir / "data/test.jsonl").exists():
            sys.exit(f"{options.dir} is not a folder of an earlier run: choose another --dir")
        shutil.rmtree(options.dir)
    bench = Bench(options)
    bench.generate_data()
    data = bench.data
    copy_steps, teacher_steps, steps = (5, 10, 2) if options.quick else (300, 1200, STEPS)

    def pretrain(name, shape):
        return bench.train(name, "pretrain.toml", [
            f"data.source={(data / 'copy.jsonl').resolve()}", f"student.path={(data / 'tokenizer').resolve()}",
            f"train.steps={copy_steps}", *shape])

    teacher = bench.train("teacher", "teacher.toml", [
        f"data.source={(data / 'teacher.jsonl').resolve()}", f"student.path={pretrain('copier', []).resolve()}",
        f"train.steps={teacher_steps}"])
    print("| model | M parameters | MB | exact match | F1 | F1 over seeds | ROUGE-L | answers/s | MiB |\n"
          "|---|---|---|---|---|---|---|---|---|")
    scores = {"teacher": [bench.score(teacher)]}
    print_row("teacher", scores["teacher"])
    cache = bench.harvest(teacher, "black-box", data / "train-prompts.jsonl")
    sources = {
        TRUTH: [f"data.source={(data / 'student.jsonl').resolve()}"],
        ANSWERS: [f"data.cache={cache.resolve()}", "data.groups=all"],
        LOGPROBS: [f"data.cache={cache.resolve()}", "data.groups=all"],
    }

    def train_row(name, source, settings, row_steps, seeds, path=teacher):
        results = []
        for seed in range(seeds):
            local = [] if source == LOGPROBS or "loss.kd=none" in settings else [f"teacher.local={teacher.resolve()}"]
            run = re.sub(r"\W+", "-", f"{name}-{seed}")
            student = bench.train(run, "student.toml", [
                *sources[source], f"student.path={path.resolve()}", *settings, *local, f"train.seed={seed}",
                f"train.steps={row_steps}"])
            results.append(bench.score(student))
        scores[name] = results
        print_row(name, results)

    train_row("student untrained", TRUTH, ["loss.kd=none"], 0, 1)
    for name, source, settings in ROWS:
        train_row(name, source, settings, steps, options.seeds)
    train_row(LONG, TRUTH, [], LONG_FACTOR * steps, 1)
    narrow = pretrain("narrow-copier", HALF_WIDTH)
    for name, settings in [("half width: CE on the truth", ["loss.kd=none"]), ("half width: KL + CE, T = 2", [])]:
        train_row(name, TRUTH, [*ALL_LAYERS, *settings], steps, 1, narrow)
    return check(scores) if options.check else 0


def check(scores):
    """Names each aim that is missed. Returns the exit status."""
    def f1(name):
        return [result["f1"] for result in scores[name]]

    names = [name for name in scores if name not in ("teacher", "student untrained")]
    best = max(names, key=lambda name: statistics.mean(f1(name)))
    share = statistics.mean(f1(best)) / f1("teacher")[0]
    size = scores[best][0]["parameters"] / scores["teacher"][0]["parameters"]
    kd = max((name for name in names if name.startswith("KL") and name != LONG), key=lambda name: statistics.mean(f1(name)))
    gain = statistics.mean(f1(kd)) - statistics.mean(f1("CE on the truth"))
    spread = max(max(f1(name)) - min(f1(name)) for name in (kd, "CE on the truth"))
    print(f"best student: {best}: {100 * share:.1f} % of the teacher's F1 with {100 * size:.1f} % of its parameters")
    print(f"{kd} ahead of CE on the truth by {100 * gain:.1f} points of F1; the spread over seeds is {100 * spread:.1f}")
    missed = [text for is_met, text in [
        (share >= 0.95 and size <= 0.5, "95 % of the teacher's F1 with 50 % of its parameters"),
        (gain > spread, "KL + CE ahead of CE by more than the spread over seeds"),
    ] if not is_met]
    for text in missed:
        print(f"missed: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
