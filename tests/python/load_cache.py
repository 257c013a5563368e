"""Loads a cache file without distill: line by line, and with `datasets`.

usage: python load_cache.py responses.jsonl

`datasets` needs no options, with one exception: if the first records have no logprobs and later ones
do, `chunksize` must exceed the size of the records without logprobs.
"""

import json
import sys
import tempfile

import datasets


def check_columns(logprobs):
    if logprobs is None:
        return 0
    tokens = len(logprobs["token"])
    for column in ("logprob", "top", "top_logprob"):
        assert len(logprobs[column]) == tokens, column
    for top, top_logprob in zip(logprobs["top"], logprobs["top_logprob"]):
        assert len(top) == len(top_logprob)
    return tokens


def main(path):
    with open(path, encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file]
    tokens = sum(check_columns(record["logprobs"]) for record in records)

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache_dir:
        rows = datasets.load_dataset(
            "json", data_files=path, cache_dir=cache_dir, split="train"
        )
        assert len(rows) == len(records), (len(rows), len(records))
        assert tokens == sum(check_columns(row["logprobs"]) for row in rows)
        for row, record in zip(rows, records):
            assert row["key"] == record["key"]
            assert row["answer"]["text"] == record["answer"]["text"]
            assert row["status"] == record["status"]
            assert row["request"]["messages"] == record["request"]["messages"]
            assert json.loads(row["request"]["params"]) == json.loads(record["request"]["params"])
            assert row["usage"] == record["usage"]
            assert row["cost_usd"] == record["cost_usd"]
            assert row["timing"]["sent_at"] == record["timing"]["sent_at"]
    print(f"{len(records)} records, {tokens} tokens with logprobs, datasets {datasets.__version__}")


main(sys.argv[1])
