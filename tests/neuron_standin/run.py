"""Runs on the stand-in for vLLM Neuron, in processes of their own: vLLM has one platform a process."""

from __future__ import annotations

import json
import os
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
    """Run ``jobs`` (see ``drive.run``) on so many ranks and return what rank 0 found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "drive.py"), str(folder / "jobs.json")]
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / "store"), str(folder / "out.pt")],
            env=environment(**env),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for log in logs:
        log.seek(0)
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    assert not failed, "".join(f"--- rank {r} ---\n{logs[r].read()[-6000:]}\n" for r in failed)
    for log in logs:
        log.close()
    return torch.load(folder / "out.pt", weights_only=True)
