"""Compares students of each loss on soft labels with their teacher; called by softlabels.sh.

A teacher is trained on the text of softlabels_text.py and queried over HTTP. Small students are trained on its answers,
with the same steps and seeds for each treatment, and compared with the teacher's full distributions on held-out
prompts.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import softlabels_text as text

KS = [1, 5, 12, 20]
# Values of `loss.kd_weight`.
WEIGHTS = [0.5, 0.8, 0.9, 1.0]
# Values of `loss.tail_weight`; 1 is `unbiased`.
TAIL_WEIGHTS = [1.0, 0.7, 0.5, 0.35, 0.2, 0.1]
# Default of `loss.tail_weight`.
DAMPED = 0.35
DIVERGENCES = ["temperature", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "renormalize", "renormalize_both"]
STUDENTS = "students.jsonl"
# Examples per step.
BATCH = 32
# Factors for the number of answers and of steps.
TIMES = [1, 2, 4]
MORE = TIMES[-1]
# Sampling temperature below 1: the answers are not samples of the distribution that their logprobs describe.
COOL = 0.7
# Hidden size, intermediate size and number of layers.
SHAPE = {"teacher": (192, 512, 4), "student": (96, 256, 2)}


class Student(NamedTuple):
    """Settings of a student's training."""

    kd: str
    k: int | None = None
    weight: float | None = None
    tail_weight: float | None = None
    times: int = 1
    cool: bool = False
    tokenizer: str = "bytelevel"
    alm: float = 0.5
    local: bool = False


CE = Student("none")
DENSE = Student("tail", local=True, weight=1.0)


def tail(k, weight, **others):
    return Student("tail", k, weight, **others)


def damped(k, tail_weight=DAMPED, weight=1.0, **others):
    return Student("damped", k, weight, tail_weight, **others)


def toml(value):
    """Formats sections of keys as TOML. Strings, numbers and booleans are written as in JSON."""
    lines = [f"{key} = {json.dumps(item)}" for key, item in value.items() if not isinstance(item, dict)]
    for name, section in value.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(item)}" for key, item in section.items())]
    return "\n".join(lines) + "\n"


class Bench:
    def __init__(self, options):
        self.options = options
        self.folder = Path(options.folder)
        self.lock = Lock()
        self.running = 0
        # Reports by student, seed and steps. With --resume they include those of the interrupted run.
        self.known = {}
        if (self.folder / STUDENTS).exists():
            lines = (self.folder / STUDENTS).read_text().splitlines()
            self.known = {key: (report, data) for key, report, data in map(json.loads, lines)}
        # One prompt per training example, so each answer is seen once.
        self.rows = {"teacher": 24_000, "prompts": MORE * options.steps * BATCH, "heldout": 400}
        self.steps = {"teacher": 2_000, "student": options.steps}
        if options.quick:
            self.rows = {"teacher": 1_000, "prompts": MORE * 400, "heldout": 60}
            self.steps = {"teacher": 60, "student": 30}

    def distill(self, *arguments):
        done = subprocess.run([self.options.distill, "--json", *arguments], cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"distill {' '.join(arguments)} failed:\n{done.stderr}")
        return json.loads(done.stdout)

    def config(self, name, **sections):
        (self.folder / f"{name}.toml").write_text(toml(sections))
        return f"{name}.toml"

    def model(self, role, tokenizer):
        hidden, inner, layers = SHAPE[role]
        return {"init": "random", "path": tokenizer, "hidden_size": hidden, "intermediate_size": inner,
                "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": 256}

    def training(self, role, seed, times=1):
        return {"steps": times * self.steps[role], "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 3e-3, "seed": seed,
                "warmup_steps": min(50, self.steps[role] // 4), "eval_every": 0, "checkpoint_every": 0,
                "dtype": self.options.dtype}

    def make_teacher(self):
        """Makes the texts, the tokenizers, a teacher and its answers. Returns the negative log-probability and the size
        of the grammar's texts."""
        known = text.make(self.folder, self.rows, self.options.seed)
        text.tokenizers(self.folder, {"bytelevel": 1024, "pieces": 1500, "large": 4096}, self.options.seed)
        config = self.config("teacher", run_dir="teacher", data={"source": "teacher.jsonl", "max_length": 256},
                             student=self.model("teacher", "bytelevel"), loss={"kd": "none"},
                             train=self.training("teacher", 0))
        self.distill("train", "-c", config, "--fresh")
        server = subprocess.Popen([self.options.distill, "--json", "serve", "--model", "teacher/student", "--name", "teacher", "--port", "0"],
                                  cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            address = json.loads(server.stdout.readline())["base_url"]
            answers = self.rows["prompts"]
            caches = [(f"{times}x", "prompts", answers * times // MORE, 1.0) for times in TIMES]
            for name, source, limit, temperature in [*caches, ("cool", "prompts", answers // MORE, COOL),
                                                     ("heldout", "heldout", self.rows["heldout"], 1.0)]:
                config = self.config(f"harvest-{name}", run_dir=name, limits={"concurrency": 64},
                                     teacher={"base_url": address, "model": "teacher", "api_key_env": ""},
                                     prompts={"source": f"{source}.jsonl", "limit": limit},
                                     sampling={"temperature": temperature, "top_logprobs": 20, "max_tokens": 96, "seed": 1})
                self.distill("harvest", "-c", config)
        finally:
            server.terminate()
            server.wait()
        return known

    def evaluate(self, model, name="eval", **sections):
        config = self.config(name, eval={"model": model, "batch_size": 32, **sections.pop("eval", {})}, **sections)
        return self.distill("eval", "-c", config)["teacher"]

    def student(self, student, seed, steps=None):
        """Trains a student; returns its evaluation on the held-out answers and the report of its training data."""
        key = json.dumps([student._asdict(), seed, steps])
        with self.lock:
            if key in self.known:
                return self.known[key]
            self.running += 1
            name = f"student-{self.running}"
        cache = "cool" if student.cool else f"{student.times}x"
        data = {"cache": f"{cache}/cache", "validation_share": 0.0, "max_length": 256}
        if student.k:
            data["top_logprobs"] = student.k
        loss = {"kd": student.kd, "alm_weight": student.alm}
        loss |= {field: value for field, value in (("kd_weight", student.weight), ("tail_weight", student.tail_weight)) if value is not None}
        training = self.training("student", seed, student.times) | {"threads": max(1, os.cpu_count() // self.options.jobs)}
        if steps is not None:
            training["steps"] = steps
        sections = {"run_dir": name, "data": data, "student": self.model("student", student.tokenizer), "loss": loss, "train": training}
        if student.local:
            sections["teacher"] = {"local": "teacher/student"}
        began = time.time()
        summary = self.distill("train", "-c", self.config(name, **sections), "--fresh")["summary"]
        held_out = {"data": {"max_length": 256}, "eval": {"teacher_cache": "heldout/cache"}}
        if student.tokenizer == "bytelevel":
            held_out["teacher"] = {"local": "teacher/student"}
        report = self.evaluate(f"{name}/student", f"{name}-eval", **held_out)
        shutil.rmtree(self.folder / name)
        settings = ", ".join(f"{field} {value}" for field, value in student._asdict().items()
                             if value != Student._field_defaults.get(field))
        print(f"  {settings}, seed {seed}: {time.time() - began:.0f} s, KL {report['kl']:.4f}", file=sys.stderr, flush=True)
        with self.lock:
            self.known[key] = (report, summary["data"])
            with open(self.folder / STUDENTS, "a") as file:
                file.write(json.dumps([key, report, summary["data"]]) + "\n")
        return self.known[key]

    def students(self, students, seeds):
        """Returns the evaluations of each student on the held-out answers, one per seed."""
        students = list(dict.fromkeys(students))
        with ThreadPoolExecutor(self.options.jobs) as pool:
            runs = {(student, seed): pool.submit(self.student, student, seed) for seed in seeds for student in students}
            return {student: [runs[student, seed].result()[0] for seed in seeds] for student in students}

    def heldout_bytes(self):
        answers = (self.folder / "heldout/cache/responses.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in answers]
        return sum(len(record["answer"]["text"].encode()) for record in records
                   if record["answer"]["finish_reason"] == "stop")


def spread(values, digits=4):
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def mean(reports, name="kl"):
    return statistics.mean(report[name] for report in reports)


def table(found, rows):
    """Prints one line per pair of label and student in `rows`."""
    print(f"{'':28}{'k':>4}{'KL to the teacher':>26}{'calibration error':>26}{'top-1 of the teacher':>26}")
    for label, student in rows:
        cells = [spread([report[name] for report in found[student]])
                 for name in ("kl", "calibration_error", "teacher_agreement")]
        k = "all" if student.local else student.k or "-"
        print(f"{label:28}{k:>4}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def grid(found, title, rows, columns, of):
    """Prints the KL to the teacher by k (`rows`) and weight (`columns`). The student of a cell is `of(row, column)`;
    cells of untrained students stay empty."""
    print(f"\n{title:28}" + "".join(f"{column:>26}" for column in columns))
    for row in rows:
        cells = [found.get(of(row, column)) for column in columns]
        shown = ["" if cell is None else spread([report["kl"] for report in cell]) for cell in cells]
        print(f"{f'k = {row}':28}" + "".join(f"{cell:>26}" for cell in shown), flush=True)


def worth(found, student, seeds):
    """Returns, by seed, how many text-only answers one answer of this student's data is worth: (KL_CE / KL)^(1 / s),
    where -s is the slope of a line fitted to ln KL_CE over the ln of the number of answers. CE is cross-entropy
    alone."""
    values = []
    for at in range(len(seeds)):
        points = [(math.log(times), -math.log(found[CE._replace(times=times)][at]["kl"])) for times in TIMES]
        slope = statistics.linear_regression(*zip(*points)).slope
        alone = found[CE._replace(times=student.times)][at]["kl"]
        values.append((alone / found[student][at]["kl"]) ** (1 / slope))
    return values


def losses(bench, seeds):
    """Trains students with every loss on the top-k, on the answers alone and on the full distribution, and prints their
    results."""
    ks = [5] if bench.options.quick else KS
    weights, tail_weights = ([1.0], [DAMPED]) if bench.options.quick else (WEIGHTS, TAIL_WEIGHTS)
    few = [("cross-entropy alone", CE)]
    few += [("renormalize, weight 0.5", Student("renormalize", k, 0.5)) for k in ks]
    few += [(f"tail, weight {weight:g}", tail(k, weight)) for weight in (0.5, 0.8) for k in ks]
    few += [(f"{name}, weight 1", damped(k, tail_weight)) for name, tail_weight in (("unbiased", 1.0), ("damped", DAMPED)) for k in ks]
    few += [("dense, weight 0.5", DENSE._replace(weight=0.5)), ("dense, weight 1", DENSE)]
    k = max(ks)
    several = [("cross-entropy", CE), ("tail, weight 0.8", tail(k, 0.8)), ("damped, weight 1", damped(k))]
    more = [(f"{name}, {MORE}x", student._replace(times=MORE)) for name, student in several]
    cool = [(f"{name}, temperature {COOL}", student._replace(cool=True)) for name, student in
            [("cross-entropy", CE), *((f"tail, weight {weight:g}", tail(k, weight)) for weight in weights)]]
    alone = [(f"{kd}, weight 1", Student(kd, k, 1.0)) for kd in DIVERGENCES]
    weighed = [damped(k, DAMPED, weight) for weight in weights]
    if bench.options.quick:
        more, alone = more[:1], alone[:1]
    of_slope = [CE._replace(times=times) for times in TIMES]
    students = [student for _, student in [*few, *more, *cool, *alone]] + weighed + of_slope
    students += [tail(k, weight) for k in ks for weight in weights]
    students += [damped(k, tail_weight) for k in ks for tail_weight in tail_weights]
    found = bench.students(students, seeds)
    table(found, few + more + cool + alone)
    grid(found, "tail, by weight", ks, weights, tail)
    grid(found, "damped, by tail_weight", ks, tail_weights, damped)
    grid(found, f"damped {DAMPED}, by weight", [k], weights, lambda k, weight: damped(k, DAMPED, weight))
    print("\ntext-only answers that one answer is worth")
    for label, student in [*few[1:], *more[1:]]:
        print(f"{label:28}{'all' if student.local else student.k:>4}{spread(worth(found, student, seeds), 2):>26}", flush=True)
    return found


def tokenizers(bench, seeds):
    """Trains students with another tokenizer, and prints their results."""
    size = bench.heldout_bytes()
    own = bench.evaluate("teacher/student", data={"max_length": 256}, eval={"teacher_cache": "heldout/cache"})
    floor = own["ce"] * own["positions"] / size
    treatments = {"same tokenizer, tail": tail(20, 0.8), "same tokenizer, damped": damped(20)}
    for label, student in (("cross-entropy", Student("none", alm=0.0)), ("tail", Student("tail", weight=0.8, alm=0.0)),
                           ("tail + chunks", Student("tail", weight=0.8)), ("damped + chunks", Student("damped", weight=1.0, tail_weight=DAMPED))):
        treatments[f"another, {label}"] = student._replace(tokenizer="pieces")
    reports = bench.students(treatments.values(), seeds)
    found = {label: [report["ce"] * report["positions"] / size - floor for report in reports[student]]
             for label, student in treatments.items()}
    print(f"\n{'nats per byte above the teacher':32}{'':>10}")
    for label, values in found.items():
        print(f"{label:32}{spread(values):>26}", flush=True)
    print("\ncoverage of the teacher's answers")
    for tokenizer in ("bytelevel", "pieces", "large"):
        _, data = bench.student(Student("tail", tokenizer=tokenizer), 0, steps=0)
        print(f"  bytelevel -> {tokenizer}: {100 * data['soft_positions'] / data['positions']:.1f} % of positions have soft "
              f"labels, mapped mass {data['mean_mapped_mass']:.3f}")
    return found


def svg(found, path):
    """Draws the KL to the teacher over k, one line per treatment."""
    width, height, left, right, top, bottom = 720, 360, 64, 150, 28, 44
    of = {"renormalize": lambda k: Student("renormalize", k, 0.5), "tail": lambda k: tail(k, 0.8),
          "unbiased": lambda k: damped(k, 1.0), "damped": damped}
    lines = {name: [(k, [r["kl"] for r in found[student(k)]]) for k in KS] for name, student in of.items()}
    flat = {"cross-entropy alone": [r["kl"] for r in found[CE]], "dense": [r["kl"] for r in found[DENSE]]}
    colours = {"renormalize": "#c0392b", "tail": "#2471a3", "unbiased": "#1e8449", "damped": "#8e44ad",
               "cross-entropy alone": "#7f8c8d", "dense": "#000000"}
    everything = [value for points in lines.values() for _, values in points for value in values]
    everything += [value for values in flat.values() for value in values]
    low, high = 0.95 * min(everything), 1.03 * max(everything)
    x = {k: left + (width - left - right) * index / (len(KS) - 1) for index, k in enumerate(KS)}

    def y(value):
        return top + (height - top - bottom) * (high - value) / (high - low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="16" font-size="13">KL divergence to the teacher on held-out answers, nats a token</text>']
    for step in range(5):
        value = low + (high - low) * step / 4
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e5e5e5"/>'
                   f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    for k in KS:
        out.append(f'<text x="{x[k]:.1f}" y="{height - 24}" text-anchor="middle">{k}</text>')
    out.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">logprobs a token (k)</text>')
    labels = []
    for name, values in flat.items():
        mean = statistics.mean(values)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(mean):.1f}" y2="{y(mean):.1f}" stroke="{colours[name]}" '
                   f'stroke-width="2" stroke-dasharray="6 4"/>')
        labels.append((y(mean), name))
    for name, points in lines.items():
        means = [(x[k], y(statistics.mean(values))) for k, values in points]
        path_of = " ".join(f"{a:.1f},{b:.1f}" for a, b in means)
        out.append(f'<polyline points="{path_of}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        for k, values in points:
            out.append(f'<line x1="{x[k]:.1f}" x2="{x[k]:.1f}" y1="{y(min(values)):.1f}" y2="{y(max(values)):.1f}" '
                       f'stroke="{colours[name]}"/><circle cx="{x[k]:.1f}" cy="{y(statistics.mean(values)):.1f}" r="3" '
                       f'fill="{colours[name]}"/>')
        labels.append((means[-1][1], name))
    at = 0
    for place, name in sorted(labels):
        at = max(place, at + 14)
        out.append(f'<text x="{width - right + 10}" y="{at + 4:.1f}" fill="{colours[name]}">{name}</text>')
    Path(path).write_text("\n".join([*out, "</svg>"]) + "\n")


def misses(found, others):
    """Returns the claims of tests/bench/README.md that do not hold."""
    def kl(student):
        return mean(found[student])

    def off(student):
        return mean(found[student], "calibration_error")

    alone = kl(CE)
    best = {k: kl(damped(k)) for k in KS}
    claims = {f"damped is the closest at k = {k}":
              best[k] < min(min(kl(tail(k, weight)) for weight in WEIGHTS), kl(damped(k, 1.0)), kl(Student("renormalize", k, 0.5)))
              for k in KS}
    claims |= {f"another tail_weight is no more than 2 % closer at k = {k}":
               best[k] < 1.02 * min(kl(damped(k, tail_weight)) for tail_weight in TAIL_WEIGHTS) for k in KS}
    claims |= {
        "damped comes closer with k": best[1] > best[5] > best[20],
        "tail at weight 0.8 is within 1 % of the best": all(kl(tail(k, 0.8)) < 1.01 * min(kl(tail(k, weight)) for weight in WEIGHTS) for k in KS),
        "tail is closer than the answers alone": all(kl(tail(k, 0.8)) < alone for k in KS),
        "renormalize is worse calibrated at k = 5": off(Student("renormalize", 5, 0.5)) > 2 * off(tail(5, 0.5)),
        "no other loss alone is closer at k = 20": best[20] < min(kl(Student(kd, 20, 1.0)) for kd in DIVERGENCES),
        f"damped is closer than tail with {MORE} times the answers":
            kl(damped(20, times=MORE)) < kl(tail(20, 0.8, times=MORE)),
        "dense is the closest": kl(DENSE) < best[20],
        "soft labels across tokenizers beat the answers alone":
            statistics.mean(others["another, tail"]) < statistics.mean(others["another, cross-entropy"]),
    }
    return [claim for claim, holds in claims.items() if not holds]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("distill")
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--svg")
    parser.add_argument("--jobs", type=int, default=1, help="number of students trained in parallel")
    parser.add_argument("--resume", action="store_true", help="keep the students of an interrupted run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.distill = os.path.abspath(options.distill)
    if not options.resume:
        shutil.rmtree(options.folder, ignore_errors=True)
    os.makedirs(options.folder, exist_ok=True)
    bench = Bench(options)
    began = time.time()
    made = bench.folder / "known.json"
    if not made.exists():
        known = bench.make_teacher()
        made.write_text(json.dumps(known))
        print(f"the teacher and its answers: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    known = json.loads(made.read_text())
    grammar = bench.evaluate("teacher/student", data={"source": "grammar.jsonl", "validation_share": 0.98})
    truth = known["log"] / known["bytes"]
    print(f"grammar: {truth:.4f} nats per byte of entropy; cross-entropy of the teacher per token: {grammar['ce']:.4f}\n")
    seeds = range(1 if options.quick else options.seeds)
    found = losses(bench, seeds)
    others = tokenizers(bench, seeds)
    if options.svg and not options.quick:
        svg(found, options.svg)
    print(f"\n{time.time() - began:.0f} s in total")
    missed = [] if options.quick else misses(found, others)
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
