"""Loads each format of `distill cache export` with the tools that read it.

usage: python exports.py DISTILL DEMO_DIR [DISTILL_WITH_PARQUET]

Each check begins with an export of the demo's cache. The first check that fails ends the script with a
traceback and a non-zero exit status.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers

distill, demo, with_parquet = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
config, teacher = demo / "harvest.toml", demo / "teacher"
# datasets keeps its files open, which can make the cleanup fail.
folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
scratch = Path(folder.name)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


def export(to, *options, program=distill):
    out = scratch / to
    command = [program, "cache", "export", "--to", to, "--json", "-o", out, *options]
    done = subprocess.run(command + ["-c", config], check=True, stdout=subprocess.PIPE, text=True)
    return str(out), json.loads(done.stdout)


def load(*arguments, **options):
    return datasets.load_dataset(*arguments, cache_dir=scratch / "datasets", split="train", **options)


def passed(what):
    print("ok:", what)


def kept(records):
    return [r for r in records if r["status"] == "ok" and r["answer"]["finish_reason"] == "stop"]


with open(demo / "harvest/cache/responses.jsonl", encoding="utf-8", newline="\n") as lines:
    records = [json.loads(line) for line in lines]
used = kept(records)
conversations = [
    r["request"]["messages"] + [{"role": "assistant", "content": r["answer"]["text"]}] for r in used
]


def check_hf():
    out, report = export("hf")
    rows = load(out)
    assert len(rows) == report["rows"] == len(used)
    assert sum(report["left_out"].values()) == len(records) - len(used)
    assert rows["messages"][:] == conversations
    assert rows["prompt_id"][:] == [r["prompt_id"] for r in used]
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(Path(out) / "README.md")
    assert card.data.configs[0]["data_files"][0]["path"] == "train.jsonl"
    passed(f"hf: {len(rows)} rows by datasets {datasets.__version__}, with a card")


def check_openai():
    import openai
    from openai.types.chat import (
        ChatCompletionAssistantMessageParam,
        ChatCompletionSystemMessageParam,
        ChatCompletionUserMessageParam,
    )
    from pydantic import TypeAdapter

    message = TypeAdapter(
        ChatCompletionSystemMessageParam
        | ChatCompletionUserMessageParam
        | ChatCompletionAssistantMessageParam
    )
    out, report = export("openai-ft")
    with open(out, encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == report["rows"]
    assert [row["messages"] for row in rows] == conversations
    for row in rows:
        assert row.keys() == {"messages"} and row["messages"][-1]["role"] == "assistant"
        for part in row["messages"]:
            message.validate_python(part, strict=True)
            assert isinstance(part["content"], str) and part.keys() == {"role", "content"}
    passed(f"openai-ft: {len(rows)} rows by the types of openai {openai.__version__}")


def check_trl():
    import trl

    out, report = export("trl")
    rows = load("json", data_files=out)
    assert len(rows) == report["rows"] == len(used)
    student = demo / "kl/student"
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(student),
        args=trl.SFTConfig(
            output_dir=scratch / "trainer",
            max_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows.select(range(32)),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for labels, conversation in zip(batch["labels"], conversations):
        learnt = tokenizer.decode(labels[labels != -100])
        # The loss is on the answer and its end-of-turn token.
        assert learnt.startswith(conversation[-1]["content"] + "<|im_end|>"), learnt
    loss = trainer.train().training_loss
    assert math.isfinite(loss)
    passed(f"trl: {len(rows)} rows, two steps of SFTTrainer {trl.__version__}, loss {loss:.3f}")


def check_axolotl():
    import axolotl
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
    from axolotl.prompt_strategies import load as load_strategy
    from axolotl.utils.dict import DictDefault

    out, report = export("axolotl", "--tokenizer", teacher)
    rows = load("json", data_files=out)
    assert len(rows) == report["rows"] and len(rows) + sum(report["left_out"].values()) == len(records)
    assert len(rows) >= 0.98 * len(used), report

    # The teacher is its own student: the KL is zero if the entries are at the right positions.
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    cfg = DictDefault(
        {"sequence_len": 2048, "train_on_inputs": False, "chat_template": "tokenizer_default"}
    )
    strategy = load_strategy("axolotl.integrations.kd.chat_template", tokenizer, cfg, {})
    count = min(64, len(rows))
    samples = [strategy.tokenize_prompt(dict(rows[i])) for i in range(count)]
    for sample in samples:
        ids, entries = sample["input_ids"], sample["target_token_ids"]
        assert len(entries) == len(sample["target_mask"]) == len(ids)
        supervised = [i for i, label in enumerate(sample["labels"]) if label != -100]
        assert all(sample["target_mask"][i][0] == 1 for i in supervised)
        for i in supervised[:-1]:
            assert ids[i + 1] in entries[i], "the entries of a position lack its next token"
    batch = DataCollatorForKD(tokenizer)(samples)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    lm_head = model.lm_head.weight.detach()
    loss = LigerFusedLinearKLTopKLogprobLoss(0.0, 1.0, beta=0.0, compiled=False)

    def kl(entries):
        # The tokens after the end of a turn are not part of the teacher's answer.
        mask = batch["target_mask"] * (batch["labels"] != tokenizer.eos_token_id)[:, :, None]
        arguments = (entries("target_token_ids"), entries("target_logprobs"), mask)
        total = loss(lm_head, hidden, *arguments, true_labels=batch["labels"])
        return float(total) / int((mask[:, :, 0] > 0).sum())

    right = kl(lambda name: batch[name])
    wrong = kl(lambda name: batch[name].roll(1, dims=1).clamp_min(-100))
    assert abs(right) < 0.01 < 0.5 < wrong, (right, wrong)
    passed(
        f"axolotl {axolotl.__version__}: {len(rows)} rows, {report['left_out']} left out; KL of the teacher to "
        f"itself {right:.5f}, one position off {wrong:.2f}"
    )


def check_parquet(program):
    import duckdb
    import pandas
    import pyarrow.parquet

    out, report = export("parquet", program=program)
    table = pyarrow.parquet.read_table(out).to_pylist()
    loaded = load("parquet", data_files=out)
    assert len(table) == len(loaded) == report["rows"] == len(used)
    for row, same, record in zip(table, loaded, used):
        for name in ("prompt_id", "sample", "model", "endpoint"):
            assert row[name] == same[name] == record[name], name
        assert row["messages"] == same["messages"] == record["request"]["messages"]
        assert row["answer"] == record["answer"]["text"]
        # A missing price is null in Parquet and 0 in the cache.
        assert (row["cost_usd"] or 0) == record["cost_usd"]
        assert row["completion_tokens"] == record["usage"]["completion_tokens"]
        ours, theirs = row["logprobs"], record["logprobs"]
        assert ours["token"] == theirs["token"] and ours["top"] == theirs["top"]
        assert same["logprobs"]["top"] == theirs["top"]
        assert ours["raw"] == theirs["raw"].split()
        for top, expected in zip(ours["top_logprob"], theirs["top_logprob"], strict=True):
            for a, b in zip(top, expected, strict=True):
                assert a == b or math.isclose(a, b, rel_tol=1e-6), (a, b)
    tokens = sum(len(r["logprobs"]["token"]) for r in used)
    query = f"select count(*), sum(len(logprobs.token)), sum(len(flatten(logprobs.top))) from read_parquet('{out}')"
    alternatives = sum(len(top) for r in used for top in r["logprobs"]["top"])
    assert duckdb.sql(query).fetchall() == [(len(used), tokens, alternatives)]
    frame = pandas.read_parquet(out)
    assert list(frame["answer"]) == [r["answer"]["text"] for r in used]
    passed(
        f"parquet: {len(table)} rows, {tokens} tokens with logprobs by pyarrow "
        f"{pyarrow.__version__}, datasets, pandas {pandas.__version__}, duckdb {duckdb.__version__}"
    )


check_hf()
check_openai()
check_trl()
check_axolotl()
for program in with_parquet:
    check_parquet(program)
