"""vLLM's ``LLM`` in a process of its own that does what it is told, one JSON object a line.

Dimensions:
    T: tokens of a text
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STOCK = {"VLLM_RMSQ_BACKEND": "off"}
"""Environment of vLLM as it is without the plugin."""

KV_CACHE_BYTES = 256 << 20
"""Sides of a comparison share the machine's memory; vLLM would reserve nearly all of it for one."""


class Scores(NamedTuple):
    """What a model makes of one text.

    Attributes:
        logprobs: ``[T - 1]`` natural logarithm of the probability of each token but the first.
        top: ``[T - 1]`` the token that the model finds most probable at each of these places.
    """

    logprobs: list[float]
    top: list[int]


class Engine:
    """A vLLM process with a model loaded.

    Args:
        checkpoint: the model.
        log: file for everything vLLM prints.
        environment: environment variables that make this side what it is.
        options: keyword arguments of ``LLM`` besides ``enforce_eager`` and the KV cache's size.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self, checkpoint: Path, log: Path, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        need_vllm()
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from {__name__} import worker; worker()",
                    str(checkpoint),
                    json.dumps(options),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # The report is fetched by a function sent to vLLM's worker process.
                env=os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | (environment or {}),
            )

    def ask(self, **command: Any) -> Any:
        """Send a command and return what came back; without one, wait until the model is loaded.

        Raises:
            ValueError: the process has ended, with the end of its log.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if command:
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ValueError(f"vLLM stopped; the end of its log {self.log}:\n{tail}")
        return json.loads(line)

    def report(self) -> dict[str, Any] | None:
        """Return what the plugin did: ``line``, ``backend`` and ``layers``; ``None`` without the plugin."""
        return self.ask(do="report")

    def chat(self, questions: Sequence[str], tokens: int) -> list[str]:
        """Answer each question, greedily, in at most ``tokens`` tokens."""
        return self.ask(do="chat", questions=list(questions), tokens=tokens)

    def speed(self, questions: Sequence[str], tokens: int) -> float:
        """Return the tokens a second of answering all questions at once with ``tokens`` tokens each."""
        return self.ask(do="speed", questions=list(questions), tokens=tokens)

    def scores(self, text: Sequence[int]) -> Scores:
        """Return what the model makes of the tokens of a text."""
        return Scores(**self.ask(do="scores", text=list(text)))

    def close(self) -> None:
        """End the process, which ends vLLM's own processes when its input ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def need_vllm() -> None:
    """Raise ValueError, in one sentence, where vLLM is not installed."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"vLLM is not installed beside {sys.executable}; install it first, on a CPU machine with "
            "pip install 'vllm-neuron-rmsq[cpu]'"
        )


def worker() -> None:
    """Load the model, say so, then obey commands until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints where replies belong

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    from vllm import LLM, SamplingParams

    options = {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES} | json.loads(sys.argv[2])
    llm = LLM(sys.argv[1], **options)
    reply("loaded")
    for line in sys.stdin:
        command = json.loads(line)
        chats = [[{"role": "user", "content": question}] for question in command.get("questions", ())]
        match command["do"]:
            case "report":
                reply(llm.apply_model(_report)[0])
            case "chat":
                params = SamplingParams(temperature=0, max_tokens=command["tokens"])
                reply([output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)])
            case "speed":
                params = SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True)
                start = time.perf_counter()
                outputs = llm.chat(chats, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                reply(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
            case "scores":
                params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
                prompt = {"prompt_token_ids": command["text"]}
                (output,) = llm.generate([prompt], params, use_tqdm=False)
                given = list(zip(output.prompt_logprobs[1:], command["text"][1:], strict=True))
                reply(
                    {
                        "logprobs": [at[token].logprob for at, token in given],
                        "top": [next(t for t, found in at.items() if found.rank == 1) for at, _ in given],
                    }
                )


def _report(model: Any) -> dict[str, Any] | None:
    report = getattr(model, "rmsq_report", None)
    return report and {
        "line": str(report),
        "backend": report.backend,
        "layers": [
            {"name": layer.name, "reason": layer.reason, "linears": layer.linears}
            for layer in (*report.norms, *report.activations)
        ],
    }
