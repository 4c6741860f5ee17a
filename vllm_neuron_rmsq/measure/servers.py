"""Servers with one interface to compare: ``vllm serve``, and llama.cpp's where ``xllamacpp`` is installed.

Both answer OpenAI's ``/v1/completions`` for prompts given as token numbers, so that every side gets the same.
Dimensions:
    T: tokens
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from vllm_neuron_rmsq.measure.engine import KV_CACHE_BYTES

CONTEXT = 1024
"""Longest prompt and answer together, in tokens."""
AT_ONCE = 16
"""Most clients at once."""
SHORT = 4
"""Tokens of the prompts whose answers are timed: prefill hardly counts."""
BIND = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's environment variable for the cores of its threads."""
PATIENCE = 1200
"""Seconds until a server that does not answer is given up: stock FP8 takes minutes for an answer."""


class Server:
    """A server that was started and is answering; :meth:`close` ends it.

    Args:
        command: starts it, listening on ``{port}``.
        log: file for everything it prints.
        environment: environment variables that make this side what it is.
        vocabulary: prompts are made of token numbers below this.

    Raises:
        ValueError: it ended before it answered; with the end of its log.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], vocabulary: int) -> None:
        import httpx
        import openai

        self._random = random.Random(0)
        self._vocabulary = vocabulary
        port = _free_port()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        self._client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE, max_retries=0
        )
        try:
            while True:
                if self.process.poll() is not None:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise ValueError(f"a server ended; the end of its log {log}:\n{tail}")
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        return
                time.sleep(0.5)
        except BaseException:
            self.close()
            raise

    async def generate(self, clients: int, prompt: int, tokens: int) -> float:
        """Return the seconds in which ``clients`` at once get ``tokens`` tokens each for random prompts.

        Args:
            prompt: tokens of each prompt.
        """
        # Token numbers near the beginning of a vocabulary may be special ones.
        prompts = [
            [self._random.randrange(self._vocabulary // 2, self._vocabulary) for _ in range(prompt)]
            for _ in range(clients)
        ]
        start = time.perf_counter()
        done = await asyncio.gather(
            *(
                self._client.completions.create(
                    model="model",
                    prompt=one,
                    max_tokens=tokens,
                    temperature=0,
                    extra_body={"ignore_eos": True, "cache_prompt": False},
                )
                for one in prompts
            )
        )
        seconds = time.perf_counter() - start
        for answer in done:
            assert answer.usage is not None
            if answer.usage.completion_tokens != tokens:
                raise ValueError(
                    f"expected {tokens} tokens of a server, got {answer.usage.completion_tokens}"
                )
        return seconds

    async def decode(self, clients: int, tokens: int) -> float:
        """Return the tokens a second after the first one of each client."""
        first = await self.generate(clients, SHORT, 1)
        return clients * tokens / (await self.generate(clients, SHORT, 1 + tokens) - first)

    async def prefill(self, prompt: int) -> float:
        """Return the tokens a second of reading one prompt, until its first token is there."""
        return prompt / await self.generate(1, prompt, 1)

    def resident(self) -> int:
        """Bytes of resident memory of the process that holds the model."""
        import psutil

        process = psutil.Process(self.process.pid)
        return max(one.memory_info().rss for one in (process, *process.children(recursive=True)))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def vllm(checkpoint: Path, log: Path, environment: dict[str, str], vocabulary: int) -> Server:
    """Start ``vllm serve`` with vLLM's defaults but two.

    Prefix caching is off: no run profits from the last. Threads are bound to every core, as many as llama.cpp
    has, unless :data:`BIND` is set: by default vLLM leaves one to the server, of two cores half.
    """
    options = (
        f"--port {{port}} --served-model-name model --max-model-len {CONTEXT} --max-num-seqs {AT_ONCE} "
        f"--no-enable-prefix-caching --kv-cache-memory-bytes {KV_CACHE_BYTES}"
    )
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint), *options.split()]
    every_core = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    bound = {BIND: os.environ.get(BIND, every_core)}
    return Server(command, log, bound | environment, vocabulary)


def llama_cpp(gguf: Path, log: Path, vocabulary: int) -> Server:
    """Start llama.cpp's server by the package ``xllamacpp`` on every core.

    Raises:
        ValueError: it is not installed, or the server ended.
    """
    command = [sys.executable, "-c", f"from {__name__} import serve_llama_cpp as s; s()", str(gguf), "{port}"]
    return Server(command, log, {}, vocabulary)


def serve_llama_cpp() -> None:
    """What the process of :func:`llama_cpp` runs: a file and a port are its arguments."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], int(sys.argv[2])
    params.hostnames = ["127.0.0.1"]
    params.n_parallel = AT_ONCE
    params.n_ctx = CONTEXT * AT_ONCE
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
