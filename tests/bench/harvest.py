#!/usr/bin/env python3
"""Times `distill harvest` beside other clients on loopback; called by harvest.sh, which creates the environment.

Contestants run in turn, each as a separate process on one core, against `distill serve --mock` on another core. Each
number is the median over the rounds. The time of rows/s includes the start and the end of the process.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

from peers import prompt

HERE = Path(__file__).resolve().parent
PEERS = str(HERE / "peers.py")
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]
# Rows of a slow contestant, as a multiple of the case's `slow_rows`.
SHARE = {"openai": 1, "curator": 4, "aiohttp": 4}


class Server:
    """A mock teacher on a free port, pinned to its own core."""

    def __init__(self, distill, script, folder):
        path = Path(folder) / "mock.toml"
        path.write_text(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = "http://127.0.0.1:%d/v1" % port
        self.process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), distill, "serve", "--mock", str(path), "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process.stdout.readline()

    def stats(self):
        with urllib.request.urlopen(self.url[:-3] + "/mock/stats") as reply:
            return json.load(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def measure(command, limit=900):
    """Runs the command; returns seconds, CPU seconds and peak MiB."""
    start = time.monotonic()
    process = subprocess.Popen(["taskset", "-c", str(CLIENT_CORE)] + command,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit("%s ended with %d:\n%s" % (command, process.returncode, error.decode()[-2000:]))
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def distill_command(distill, folder, url, case):
    config = Path(folder) / "run.toml"
    prompts = Path(folder) / "prompts.jsonl"
    if not prompts.exists():
        with open(prompts, "w") as out:
            for row in range(case["rows"]):
                out.write('{"id": "%d", "messages": [{"role": "user", "content": "%s"}]}\n' % (row, prompt(row)))
    run = Path(folder) / "run"
    shutil.rmtree(run, ignore_errors=True)
    limits = "".join("%s = %d\n" % item for item in case.get("limits", {}).items())
    config.write_text("""run_dir = "run"
[teacher]
base_url = "%s"
model = "mock"
api_key_env = ""
[prompts]
source = "prompts.jsonl"
[sampling]
max_tokens = %d
top_logprobs = %d
[limits]
concurrency = %d
%s
""" % (url, case["max_tokens"], case["top"], case["concurrency"], limits))
    return [distill, "harvest", "-c", str(config), "--json"]


def command(name, arguments, folder, url, case):
    if name in ("distill", "before"):
        binary = arguments.distill if name == "distill" else arguments.before
        return distill_command(binary, folder, url, case)
    if name == "bare reqwest":
        return [arguments.bare, url, str(case["rows"]), str(case["concurrency"]), str(case["top"]),
                str(case["max_tokens"])]
    out = Path(folder) / ("out-" + name)
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, PEERS, name, url, str(case["rows"]), str(case["concurrency"]), str(case["top"]),
            str(case["max_tokens"]), str(out)]


def run_case(title, case, contestants, arguments):
    """Returns the measurements of each round by contestant."""
    figures = {name: [] for name in contestants}
    for round_number in range(min(arguments.rounds, case.get("rounds", 99)) + 1):
        # Unwritten pages of one contestant slow the next one. The order alternates, so that this affects all of them.
        for name in contestants if round_number % 2 else reversed(contestants):
            os.sync()
            # Slow peers get fewer rows; this hardly changes their rows/s.
            mine = dict(case, rows=min(case["rows"], case.get("slow_rows", case["rows"]) * SHARE.get(name, 1_000)))
            if round_number == 0 and not arguments.quick:
                mine["rows"] //= 10  # the warm-up
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, \
                    Server(arguments.distill, case["script"], folder) as server:
                seconds, cpu, peak = measure(command(name, arguments, folder, server.url, mine))
                stats = server.stats()
            if stats["answered"] < mine["rows"]:
                raise SystemExit("%s: %s has %d answers of %d" % (title, name, stats["answered"], mine["rows"]))
            if round_number == 0 and not arguments.quick:
                continue
            figures[name].append({
                "rows/s": mine["rows"] / seconds, "cpu": cpu / mine["rows"] * 1000, "peak": peak,
                "seconds": seconds, "throttled": stats["throttled"] / max(1, stats["requests"]),
                "requests": stats["requests"], "tokens": stats["billed"]["completion_tokens"]})
        if arguments.quick:
            break
    return figures


def median(rows, key):
    return statistics.median(row[key] for row in rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--distill", required=True)
    parser.add_argument("--bare", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--peers", default="aiohttp,openai,curator")
    parser.add_argument("--before", help="another distill binary to measure in the same rounds")
    parser.add_argument("--cases", default="P1,P2,P3,P3gzip,P4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    peers = [name for name in arguments.peers.split(",") if name]
    scale = 10 if arguments.quick else 1
    cases = {
        "P1": ("no limit, no latency, 300-byte requests, 500-byte replies, 256 in flight", dict(
            rows=100_000 // scale, slow_rows=5_000 // scale, concurrency=256, top=0, max_tokens=32,
            script='[answers]\ntext = { fixed = "ok" }\n[limits]\nheaders = "none"\n')),
        "P2": ("2 s of latency, 2,000 in flight", dict(
            rows=12_000 // scale, slow_rows=3_000 // scale, concurrency=2_000, top=0, max_tokens=32,
            script='[answers]\ntext = { fixed = "ok" }\nlatency_s = 2.0\n[limits]\nheaders = "none"\n')),
        "P3": ("top-20 logprobs of 500 tokens", dict(
            rows=2_000 // scale, slow_rows=100 // scale, concurrency=64, top=20, max_tokens=500,
            script='[answers]\ntokens = 500\n[limits]\nheaders = "none"\n')),
        # P3 with compressed replies: shows the CPU time of decompression.
        "P3gzip": ("top-20 logprobs of 500 tokens, gzip", dict(
            rows=2_000 // scale, slow_rows=100 // scale, concurrency=64, top=20, max_tokens=500,
            script='[answers]\ntokens = 500\ngzip = true\n[limits]\nheaders = "none"\n')),
        "P4": ("3,000 requests/min + 600,000 tokens/min", dict(
            rows=6_000 // scale, concurrency=256, top=0, max_tokens=32, rounds=2,
            limits={"requests_per_minute": 3000, "tokens_per_minute": 600000},
            script='[answers]\nlatency_s = [0.5, 2.0]\n[limits]\nrequests_per_minute = 3000\n'
                   'tokens_per_minute = 600000\nburst_s = 1.0\n')),
    }
    versions = [name + " " + version(package) for name, package in
                (("aiohttp", "aiohttp"), ("openai", "openai"), ("curator", "bespokelabs-curator")) if name in peers]
    print(", ".join(["Python %d.%d" % sys.version_info[:2]] + versions))
    misses = []

    def aim(holds, text):
        if not holds:
            misses.append(text)

    for key in arguments.cases.split(","):
        title, case = cases[key]
        contestants = ["distill"] if key == "P4" else ["bare reqwest", "distill"] + peers
        if key == "P3gzip":
            contestants = ["distill"]
        if arguments.before:
            contestants.insert(contestants.index("distill"), "before")
        figures = run_case(title, case, contestants, arguments)
        print("\n%s: %s" % (key, title))
        print("%-14s %10s %16s %16s %10s" % ("", "rows/s", "(min-max)", "CPU ms per row", "peak MiB"))
        for name in contestants:
            rows = figures[name]
            speeds = [row["rows/s"] for row in rows]
            spread = "%.0f-%.0f" % (min(speeds), max(speeds))
            print("%-14s %10.0f %16s %16.3f %10.0f"
                  % (name, median(rows, "rows/s"), spread, median(rows, "cpu"), median(rows, "peak")))
        ours = figures["distill"]
        if key == "P1":
            share = median(ours, "rows/s") / median(figures["bare reqwest"], "rows/s")
            print("distill reaches %.0f %% of the bare loop's rows/s, with durable writes" % (100 * share))
            aim(share >= 0.6, "P1: %.0f %% of the bare loop, aim 60 %%" % (100 * share))
            if "curator" in figures:
                ratio = median(figures["curator"], "cpu") / median(ours, "cpu")
                print("curator uses %.0f times the CPU per row" % ratio)
                aim(ratio >= 20, "P1: curator uses %.1f times the CPU per row, aim 20" % ratio)
        if arguments.before:
            before = figures["before"]
            print("distill against before: %.2f times the rows/s, %.2f times the CPU per row"
                  % (median(ours, "rows/s") / median(before, "rows/s"), median(ours, "cpu") / median(before, "cpu")))
        if key == "P3":
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, \
                    Server(arguments.distill, case["script"], folder) as server:
                out = subprocess.run([arguments.bare, server.url, "1", "1", "20", "500"], capture_output=True, text=True)
                size = int(out.stdout)
            rate = size * 1000 / median(ours, "cpu") / 1e6
            print("distill reads, compacts and keeps %.0f MB of JSON per CPU second (%d bytes per reply)" % (rate, size))
            aim(rate >= 150, "P3: %.0f MB/s of JSON per core, aim 150" % rate)
        if key == "P4":
            share = median(ours, "rows/s") * 60 / 3000
            throttled = median(ours, "throttled")
            print("%.1f %% of the limit, %.2f %% of the requests refused with 429" % (100 * share, 100 * throttled))
            if not arguments.quick:
                aim(share >= 0.98, "P4: %.1f %% of the limit, aim 98 %%" % (100 * share))
            aim(throttled <= 0.001, "P4: %.2f %% 429, aim 0.1 %%" % (100 * throttled))
        sys.stdout.flush()
    for miss in misses:
        print("missed: " + miss)
    if misses and arguments.check:
        raise SystemExit(1)


main()
