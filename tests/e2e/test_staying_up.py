"""What goes wrong around a server: clients that leave, too little KV cache, a full disk, a killed worker.

The plugin's server does what stock vLLM's does (the same model in bf16, plugin off), and leaves nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import requests
from servers import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KV_BYTES = 24 << 20
"""Room for some 1,000 tokens."""


class Side:
    """A server, and its temporary directory."""

    def __init__(self, checkpoint: Path, folder: Path, **environment: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.server = Server(
            checkpoint, folder,
            "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16",
            "--kv-cache-memory-bytes", str(KV_BYTES), TMPDIR=str(self.temporary), **environment,
        )  # fmt: skip
        self.server.wait()

    def metric(self, name: str) -> float:
        text = requests.get(f"http://127.0.0.1:{self.server.port}/metrics", timeout=10).text
        return sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(f"{name}{{"))

    def stream(self, tokens: int):
        body = {"model": "smollm2", "prompt": "One, two,", "max_tokens": tokens, "temperature": 0}
        return self.server.client.completions.create(**body, stream=True, extra_body={"ignore_eos": True})

    def files(self) -> list[str]:
        """What is there of the plugin's."""
        return [path.name for path in self.temporary.iterdir() if path.name.startswith("rmsq")]


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """What they have mapped of it. Other servers of this machine have some too."""
    maps = [entry.path for process in processes for entry in process.memory_maps()]
    return {Path(path) for path in maps if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}


@pytest.fixture(scope="module")
def sides(smollm2_fp8, smollm2_bf16, tmp_path_factory):
    """The plugin's server, then stock vLLM's: one after the other would take as long, and less memory."""
    made = []
    space = os.environ.pop("VLLM_CPU_KVCACHE_SPACE")  # the tests' own, which would win
    try:
        for name, checkpoint, backend in (("plugin", smollm2_fp8, "auto"), ("stock", smollm2_bf16, "off")):
            made.append(Side(checkpoint, tmp_path_factory.mktemp(name), VLLM_RMSQ_BACKEND=backend))
        yield made
    finally:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = space
        for side in made:
            side.server.kill()


def test_clients_that_leave_are_forgotten(sides):
    def outcome(side: Side) -> tuple[float, bool]:
        for chunks in (0, 1, 7):
            stream = side.stream(400)
            for _, _ in zip(range(chunks), stream, strict=False):
                pass
            stream.close()
        deadline = time.monotonic() + 60
        while (running := side.metric("vllm:num_requests_running")) and time.monotonic() < deadline:
            time.sleep(0.2)
        return running, len(list(side.stream(5))) >= 5

    plugin, stock = map(outcome, sides)
    assert plugin == stock == (0, True)


def test_out_of_kv_cache_requests_wait(sides):
    def outcome(side: Side) -> tuple[list[int], bool]:
        def ask(number: int) -> int:
            reply = side.server.client.completions.create(
                model="smollm2",
                prompt=f"{number}, two, three,",
                max_tokens=300,
                extra_body={"ignore_eos": True},
            )
            return reply.usage.completion_tokens

        with ThreadPoolExecutor(12) as pool:
            counts = list(pool.map(ask, range(12)))
        return counts, side.metric("vllm:num_preemptions_total") > 0

    plugin, stock = map(outcome, sides)
    assert plugin == stock
    assert plugin == ([300] * 12, True), sides[0].server.text()[-6000:]


def test_on_a_full_disk_it_serves_on(sides):
    """No process of the server may write to a file any more, as on a full disk."""

    def outcome(side: Side) -> tuple[bool, bool]:
        main = psutil.Process(side.server.process.pid)
        family = [process.pid for process in (main, *main.children(recursive=True))]
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in family}
        before = side.metric("vllm:generation_tokens_total")
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            log = side.server.log.stat().st_size
            answered = len(list(side.stream(20))) > 0  # a chunk may hold several tokens
            assert side.server.log.stat().st_size == log  # it had to say that it answered
            return answered, side.metric("vllm:generation_tokens_total") == before + 20
        finally:
            for pid, limit in limits.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)

    rows = sides[0].metric("vllm:rmsq_packed_rows_total")
    plugin, stock = map(outcome, sides)
    assert plugin == stock == (True, True)
    time.sleep(2)  # they are counted once a second
    assert sides[0].metric("vllm:rmsq_packed_rows_total") > rows


def test_a_killed_worker_ends_the_server_and_nothing_is_left(sides):
    def outcome(side: Side) -> tuple[int, list, int]:
        assert len(side.files()) == (side is sides[0])
        main = psutil.Process(side.server.process.pid)
        family = [main, *main.children(recursive=True)]
        shared = shared_memory(family)
        worker = next(process for process in family if "Worker" in " ".join(process.cmdline()))
        stream = iter(side.stream(400))
        next(stream)
        worker.send_signal(signal.SIGKILL)
        with pytest.raises((openai.APIError, requests.RequestException, StopIteration)):
            while True:
                next(stream)
        status = side.server.process.wait(120)
        outlived = psutil.wait_procs(family, timeout=30)[1]
        return status, outlived, sum(path.exists() for path in shared)

    plugin, stock = map(outcome, sides)
    assert plugin == stock
    assert plugin[1] == []
    assert sides[0].files() == sides[1].files() == []
