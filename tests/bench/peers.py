#!/usr/bin/env python3
"""The Python contestants of tests/bench/harvest.sh: peers.py NAME URL ROWS CONCURRENCY TOP_LOGPROBS MAX_TOKENS OUT

Each sends ROWS requests, at most CONCURRENCY at a time, and writes every answer to OUT.
"""

import asyncio
import json
import sys


def prompt(row):
    """A prompt whose request has about 300 bytes."""
    return ("prompt number %d " % row).ljust(200, ".")


def body(row):
    fields = {
        "model": "mock",
        "messages": [{"role": "user", "content": prompt(row)}],
        "max_completion_tokens": MAX_TOKENS,
    }
    if TOP:
        fields.update(logprobs=True, top_logprobs=TOP)
    return fields


async def with_aiohttp():
    import aiohttp

    rows = iter(range(ROWS))
    with open(OUT, "w") as out:
        connector = aiohttp.TCPConnector(limit=CONCURRENCY)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def work():
                for row in rows:
                    async with session.post(URL + "/chat/completions", json=body(row)) as response:
                        response.raise_for_status()
                        out.write(json.dumps(await response.json()) + "\n")

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


async def with_openai():
    import httpx
    import openai

    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    client = openai.AsyncOpenAI(base_url=URL, api_key="none", timeout=600,
                                http_client=openai.DefaultAsyncHttpxClient(limits=limits))
    rows = iter(range(ROWS))
    with open(OUT, "w") as out:

        async def work():
            for row in rows:
                completion = await client.chat.completions.create(**body(row))
                out.write(completion.model_dump_json() + "\n")

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


def with_curator():
    import os

    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["CURATOR_VIEWER"] = "0"
    os.environ["TELEMETRY_ENABLED"] = "0"
    os.environ["CURATOR_CACHE_DIR"] = OUT
    import tiktoken

    # To count tokens, curator would download a vocabulary. It counts bytes instead.
    vocabulary = {bytes([byte]): byte for byte in range(256)}
    count = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=vocabulary, special_tokens={})
    tiktoken.get_encoding = tiktoken.encoding_for_model = lambda _: count
    from bespokelabs import curator

    many = 10_000_000_000
    parameters = {"max_completion_tokens": MAX_TOKENS}
    if TOP:
        parameters.update(logprobs=True, top_logprobs=TOP)
    model = curator.LLM(
        model_name="mock", backend="openai",
        backend_params={"base_url": URL, "max_requests_per_minute": many, "max_tokens_per_minute": many,
                        "max_concurrent_requests": CONCURRENCY, "max_retries": 2},
        generation_params=parameters,
    )
    model([prompt(row) for row in range(ROWS)])


if __name__ == "__main__":
    NAME, URL, ROWS, CONCURRENCY, TOP, MAX_TOKENS, OUT = sys.argv[1:]
    ROWS, CONCURRENCY, TOP, MAX_TOKENS = int(ROWS), int(CONCURRENCY), int(TOP), int(MAX_TOKENS)
    {"aiohttp": lambda: asyncio.run(with_aiohttp()),
     "openai": lambda: asyncio.run(with_openai()),
     "curator": with_curator}[NAME]()
