"""Runs on the stand-in for vLLM Neuron, in processes of their own: vLLM has one platform a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PATHS = (HERE / "packages", HERE / "plugin")


def environment(**changes: str) -> dict[str, str]:
    """A user's environment in CPU mode, the stand-in and its platform plugin installed, one thread a
    process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_RMSQ_", "NEURON_", "NKI_"))}
    path = os.pathsep.join(map(str, PATHS))
    return clean | {
        "PYTHONPATH": path,
        "VLLM_NEURON_CPU_MODE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        **changes,
    }


def drive(jobs: list[dict], folder: Path, ranks: int = 1, timeout: float = 240, **env: str) -> list[dict]:
    """Run ``jobs`` (see ``drive.py``) on so many ranks; return what rank 0 found. ``folder`` has the log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "drive.py"), str(folder / "jobs.json"), str(ranks), str(folder)]
    log = folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment(**env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that wait for one that failed
    assert code == 0, log.read_text()[-6000:]
    return torch.load(folder / "out.pt", weights_only=True)
