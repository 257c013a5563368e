"""Tests a running `distill serve` with the official Python client.

    distill serve --model DIR --port 8000
    python tests/python/openai_client.py http://127.0.0.1:8000/v1

Works with any model, also with random weights. Prints a line per check; the first check that fails
ends the script with a traceback and a non-zero exit status. Needs `pip install openai`.
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none needed", max_retries=0, timeout=120)
messages = [{"role": "user", "content": "Say something about the sea."}]


def chat(**options):
    settings = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32} | options
    return client.chat.completions.create(**settings)


def passed(what):
    print("ok:", what)


def rejected(error, code=None, **options):
    try:
        chat(**options)
    except error as caught:
        assert caught.code == code, caught
        assert caught.type == "invalid_request_error", caught
        return caught
    raise AssertionError(f"not rejected: {options}")


model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
passed(f"models: list and retrieve, `{model}`")

answer = chat()
choice = answer.choices[0]
assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
usage = answer.usage
assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 32
passed(f"chat completion: {usage.completion_tokens} tokens, {choice.finish_reason}")

with chat(stream=True, stream_options={"include_usage": True}) as stream:
    chunks = list(stream)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == choice.message.content
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].usage == usage and chunks[-1].choices == []
passed(f"stream: {len(chunks)} chunks, the same text and usage")

with client.chat.completions.stream(model=model, messages=messages, max_tokens=8) as stream:
    deltas = [event.delta for event in stream if event.type == "content.delta"]
    snapshot = stream.current_completion_snapshot
assert "".join(deltas) == snapshot.choices[0].message.content
passed("stream helper: content deltas and snapshot")

answer = chat(temperature=1, seed=5, logprobs=True, top_logprobs=20)
positions = answer.choices[0].logprobs.content
data = b"".join(bytes(p.bytes) for p in positions)
assert data.decode(errors="replace") == answer.choices[0].message.content
for p in positions:
    assert len(p.top_logprobs) == 20
    assert sum(math.exp(t.logprob) for t in p.top_logprobs) <= 1
    same = [t.logprob for t in p.top_logprobs if (t.token, t.bytes) == (p.token, p.bytes)]
    assert not p.bytes or not same or same == [p.logprob]
passed(f"logprobs: {len(positions)} positions with 20 alternatives; their bytes equal the content")

again = chat(temperature=1, seed=5, logprobs=True, top_logprobs=20)
assert again.choices[0].message.content == answer.choices[0].message.content
assert again.system_fingerprint == answer.system_fingerprint
passed("seed: the same answer twice")

answers = chat(temperature=1, seed=5, n=4).choices
assert [c.index for c in answers] == [0, 1, 2, 3]
assert answers[0].message.content == answer.choices[0].message.content
passed("n: four answers, the first equal to the answer of n=1")

letter = next((c for c in choice.message.content[1:] if c.isalnum()), None)
if letter:
    stopped = chat(stop=[letter, "\n\n\n\n"]).choices[0]
    assert stopped.message.content == choice.message.content.split(letter)[0]
    assert stopped.finish_reason == "stop"
    passed(f"stop: the answer ends before {letter!r}")

short = chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=1)
assert short.usage.completion_tokens == 1
passed("max_completion_tokens: one token")

parts = [{"type": "text", "text": messages[0]["content"]}]
assert chat(messages=[{"role": "user", "content": parts}]).usage == usage
passed("content: text parts are joined")

prompt = "Say something about the sea."
written = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=1, seed=3, echo=True, logprobs=5)
columns = written.choices[0].logprobs
assert written.object == "text_completion" and written.choices[0].text.startswith(prompt)
assert columns.token_logprobs[0] is None and len(columns.tokens) == written.usage.total_tokens
assert all(len(top) <= 5 for top in columns.top_logprobs[1:]) and columns.text_offset[0] == 0
read = client.completions.create(model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
assert read.text == prompt and read.logprobs.tokens == columns.tokens[: len(read.logprobs.tokens)]
assert all(abs(a - b) < 1e-3 for a, b in zip(read.logprobs.token_logprobs[1:], columns.token_logprobs[1:]))
passed(f"completions: {len(read.logprobs.tokens)} tokens of the prompt, with equal logprobs when generated and when scored")

dialect = {"prompt_logprobs": 3, "continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
conversation = messages + [{"role": "assistant", "content": "It is wide and blue."}]
scored = chat(messages=conversation, max_tokens=1, extra_body=dialect)
positions = scored.prompt_logprobs
assert positions[0] is None and len(positions) == scored.usage.prompt_tokens == len(scored.prompt_token_ids)
own = [position[str(token)] for position, token in zip(positions[1:], scored.prompt_token_ids[1:])]
assert "".join(token["decoded_token"] for token in own).endswith("It is wide and blue.")
assert all(token["logprob"] <= 0 for token in own) and all(3 <= len(position) <= 4 for position in positions[1:])
passed(f"vLLM's prompt_logprobs: {len(positions)} positions, which end with the given answer")

with ThreadPoolExecutor(16) as pool:
    together = list(pool.map(lambda _: chat().choices[0].message.content, range(16)))
assert together == [choice.message.content] * 16
passed("concurrency: 16 concurrent requests, 16 equal greedy answers")

rejected(openai.NotFoundError, "model_not_found", model="no-such-model")
passed("NotFoundError: unknown model name")
rejected(openai.BadRequestError, temperature=3)
rejected(openai.BadRequestError, top_logprobs=2)
rejected(openai.BadRequestError, logprobs=True, top_logprobs=21)
rejected(openai.BadRequestError, n=0)
rejected(openai.BadRequestError, messages=[])
caught = rejected(openai.BadRequestError, extra_body={"max_tokens": "many"})
assert caught.param == "max_tokens"
passed("BadRequestError: values of the wrong type or out of range, with the field's name")
too_long = [{"role": "user", "content": "sea " * 200_000}]
rejected(openai.BadRequestError, "context_length_exceeded", messages=too_long)
passed("BadRequestError: context_length_exceeded")
