"""``vllm serve`` as a user starts it, for tests and for the soak."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import requests

START_SECONDS = 280


class Server:
    """``vllm serve`` in a process group of its own, logging to a file."""

    def __init__(self, checkpoint: Path, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "server.log"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "smollm2"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command + list(arguments),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_CACHE_ROOT": str(folder.parent / "vllm-cache")} | environment,
                start_new_session=True,
            )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")

    def wait(self) -> None:
        """Wait until the server answers; fail with its log when it ends instead."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"server ended:\n{self.text()[-6000:]}"
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=2).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError(f"server not ready in {START_SECONDS} s:\n{self.text()[-6000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> list[psutil.Process]:
        """Ask the server to end as a user's Ctrl-C would; return the processes that outlive it."""
        family = [
            *psutil.Process(self.process.pid).children(recursive=True),
            psutil.Process(self.process.pid),
        ]
        self.process.terminate()
        self.process.wait(60)
        return psutil.wait_procs(family, timeout=30)[1]

    def kill(self) -> None:
        """End every process of it at once, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait(60)

    def ask(self, question: str, **options) -> str:
        messages: Any = [{"role": "user", "content": question}]
        reply = self.client.chat.completions.create(
            model="smollm2", messages=messages, temperature=0, **{"max_tokens": 16} | options
        )
        return reply.choices[0].message.content or ""
