"""A server under more requests than it can answer, good and bad ones, for minutes: ``make soak MINUTES=10``.

The clients never pause: prompts and answers of mixed length, streamed or not; streams that are dropped
half-way; requests that must be refused; bodies that are no JSON. All the while the same clear questions are
asked again. At the end it must hold that

- every good request was answered, every bad one refused with a 4xx, and the log has no traceback;
- the clear questions had the same answers before, during and after;
- memory has not grown since everything was warm;
- no row was invalid, and nothing is left when the server has ended.

Exit status: 0 all of it held, 1 something did not; what, is said.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from servers import Server

from vllm_neuron_rmsq.cli import smollm2

CONTEXT = 1024
LOAD, ABORTING, BREAKING = 24, 4, 2
"""Clients at once that ask what can be answered, that drop the answer, that ask what cannot."""
ARGUMENTS = (
    "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", "512", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(128 << 20),
)  # fmt: skip
QUESTIONS = (
    "Complete: The capital of France is",
    "What is the capital of Japan?",
    "What is the capital of Germany?",
    "What is the capital of Egypt?",
    "What is the capital of Greece?",
    "Repeat: one two three four five six",
)
MARGIN = 0.25
"""Nats between the two likeliest tokens, from which on a question counts as clear: vLLM's own matmuls and
attention round otherwise in another batch, which moves log-probabilities by a few hundredths."""
WARM, GROWTH, GROWTH_BYTES = 0.4, 0.02, 32 << 20
"""Part of the time after which memory counts as warm, and what it may grow from then on: both together."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


class Soak:
    """The clients, and what they saw."""

    def __init__(self, server: Server, http: aiohttp.ClientSession, ends: float) -> None:
        self.server, self.http, self.ends = server, http, ends
        self.url = f"http://127.0.0.1:{server.port}"
        self.done: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.random = random.Random(0)

    def problem(self, text: str) -> None:
        self.done["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)

    async def post(self, path: str, body: Any) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        async with self.http.post(self.url + path, data=data, headers=headers) as reply:
            return reply.status, await reply.text()

    async def answer(self, question: str) -> tuple[str, float]:
        """The greedy answer, and how clear its least clear token is, in nats."""
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 8,
            "logprobs": True,
            "top_logprobs": 2,
        }
        status, text = await self.post("/v1/chat/completions", body)
        if status != 200:
            raise RuntimeError(f"{question!r}: {status} {text[:300]}")
        choice = json.loads(text)["choices"][0]
        tops = [[top["logprob"] for top in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
        return choice["message"]["content"], min(first - second for first, second in tops)

    def request(self, tokens: int) -> dict[str, Any]:
        words = self.random.randint(1, 500)
        return {
            "model": "smollm2",
            "prompt": " ".join(self.random.choices(WORDS, k=words)),
            "max_tokens": tokens,
            "temperature": self.random.choice([0, 1]),
            "ignore_eos": True,
        }

    async def good(self) -> None:
        """Ask, streamed or not, and count the tokens that came."""
        tokens = self.random.randint(1, 64)
        body = self.request(tokens)
        if self.random.random() < 0.5:
            status, text = await self.post("/v1/completions", body)
            came = json.loads(text)["usage"]["completion_tokens"] if status == 200 else text[:300]
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            came = "no usage"
            async with self.http.post(f"{self.url}/v1/completions", json=body) as reply:
                status = reply.status
                async for chunk in self.chunks(reply):
                    if chunk.get("usage"):
                        came = chunk["usage"]["completion_tokens"]
        if (status, came) != (200, tokens):
            self.problem(f"a request for {tokens} tokens: {status}, {came}")
        self.done["answered"] += 1

    @staticmethod
    async def chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        async for line in reply.content:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))

    async def aborting(self) -> None:
        """Drop the connection after a few chunks of a long answer, or before the first."""
        body = self.request(256) | {"stream": True}
        patience = self.random.randint(0, 5)
        async with self.http.post(f"{self.url}/v1/completions", json=body) as reply:
            if patience:
                async for _ in self.chunks(reply):
                    patience -= 1
                    if patience <= 0:
                        break
            reply.close()
        self.done["dropped"] += 1

    async def bad(self) -> None:
        """Ask what must be refused."""
        good = self.request(4)
        path, body = self.random.choice(
            [
                ("/v1/completions", good | {"prompt": "word " * 2 * CONTEXT}),
                ("/v1/completions", good | {"model": "another"}),
                ("/v1/completions", good | {"max_tokens": -1}),
                ("/v1/completions", good | {"temperature": "hot"}),
                ("/v1/completions", good | {"prompt": [[10**9]]}),
                ("/v1/completions", b'{"model": "smollm2", "prompt": "cut o'),
                ("/v1/completions", b"\xff\xfe\x00 no JSON"),
                ("/v1/chat/completions", {"model": "smollm2", "messages": "none"}),
                ("/v1/chat/completions", b"[]"),
                ("/v1/nothing", good),
            ]
        )
        status, text = await self.post(path, body)
        if not 400 <= status < 500:
            self.problem(f"{path} {str(body)[:100]}: expected to be refused, got {status} {text[:200]}")
        self.done["refused"] += 1
        await asyncio.sleep(0.1)

    async def repeat(self, ask: Callable[[], Any]) -> None:
        while time.monotonic() < self.ends:
            try:
                await ask()
            except Exception as error:
                self.problem(f"{ask.__name__}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)

    async def check_answers(self, expected: dict[str, str], when: str) -> None:
        for question, wanted in expected.items():
            got, _ = await self.answer(question)
            if got != wanted:
                self.problem(f"{when}, {question!r}: {got!r}, and {wanted!r} before")
            self.done["same answers"] += got == wanted

    async def watch(self) -> None:
        """Sum up what the server's processes hold of their own."""
        main = psutil.Process(self.server.process.pid)
        began = time.monotonic()
        while time.monotonic() < self.ends:
            own = 0
            for process in (main, *main.children(recursive=True)):
                try:
                    own += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            self.memory.append((time.monotonic() - began, own))
            await asyncio.sleep(2)

    def check_memory(self) -> None:
        total = self.memory[-1][0]
        parts = [
            statistics.median(used for when, used in self.memory if begin <= when / total <= end)
            for begin, end in ((WARM, WARM + 0.2), (0.8, 1.0))
        ]
        grown = parts[1] - parts[0]
        print(f"memory: {parts[0] / 2**20:.0f} MiB warm, {parts[1] / 2**20:.0f} MiB at the end")
        if grown > GROWTH_BYTES and grown > GROWTH * parts[0]:
            self.problem(f"memory grew by {grown / 2**20:.0f} MiB after it was warm")

    async def read_rows(self) -> dict[str, float]:
        """Rows packed and invalid until now. vLLM's warm-up has invalid ones, as it writes no attention."""
        async with self.http.get(f"{self.url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        values = {
            name: sum(
                float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:rmsq_{name}_rows")
            )
            for name in ("packed", "invalid")
        }
        return values

    async def check_rows(self, before: dict[str, float]) -> None:
        await asyncio.sleep(2)  # they are read once a second
        packed, invalid = (
            now - then for now, then in zip((await self.read_rows()).values(), before.values(), strict=True)
        )
        print(f"rows: {packed:,.0f} packed, {invalid:.0f} invalid")
        if invalid or not packed:
            self.problem(f"rows: expected some packed and none invalid, got {packed:.0f} and {invalid:.0f}")


def state(temporary: Path) -> set[str]:
    """What the plugin might leave: shared memory, and files of its own."""
    return {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")} | set(map(str, temporary.glob("rmsq-*")))


async def run(server: Server, minutes: float) -> Soak:
    """Load the server for so many minutes and return what was seen."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        soak = Soak(server, http, time.monotonic() + 60 * minutes)
        await asyncio.sleep(2)
        rows = await soak.read_rows()
        answers = {question: await soak.answer(question) for question in QUESTIONS}
        clear = {question: text for question, (text, margin) in answers.items() if margin >= MARGIN}
        print(f"clear questions: {len(clear)} of {len(QUESTIONS)}", flush=True)
        if not clear:
            soak.problem("no question is clear to this model")

        async def check() -> None:
            await soak.check_answers(clear, "during")
            await asyncio.sleep(5)

        clients = [soak.good] * LOAD + [soak.aborting] * ABORTING + [soak.bad] * BREAKING + [check]
        await asyncio.gather(soak.watch(), *(soak.repeat(client) for client in clients))
        await soak.check_answers(clear, "after")
        await soak.check_rows(rows)
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--checkpoint", type=Path, help="by default SmolLM2-135M, made in .cache")
    options = parser.parse_args()
    checkpoint = options.checkpoint or smollm2.fp8(Path(".cache"))
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        before = state(temporary)
        server = Server(checkpoint, Path(folder), *ARGUMENTS, TMPDIR=str(temporary))
        try:
            server.wait()
            soak = asyncio.run(run(server, options.minutes))
            outlived = server.stop()
        finally:
            server.kill()
        text, left = server.text(), state(temporary) - before
    soak.check_memory()
    if outlived:
        soak.problem(f"processes outlived the server: {outlived}")
    if "Traceback" in text:
        soak.problem("the server's log has a traceback:\n" + text[text.index("Traceback") :][:3000])
    if left:
        soak.problem(f"left behind: {', '.join(sorted(left))}")
    print(", ".join(f"{count} {what}" for what, count in sorted(soak.done.items())))
    for problem in soak.problems:
        print(f"problem: {problem}")
    print("failed" if soak.problems else "all held")
    return bool(soak.problems)


if __name__ == "__main__":
    sys.exit(main())
