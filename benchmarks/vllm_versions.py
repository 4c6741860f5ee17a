"""Does another vLLM compute what this one does? SmolLM2 in FP8 through both.

    python benchmarks/vllm_versions.py PYTHON...

``PYTHON`` is that of an environment with another vLLM and the plugin; ``make test-vllm`` makes one.
Each side runs ``tests/vllm_fingerprint.py``, eager and compiled, fused and not. One line for each goes to
``results/vllm_versions.csv``, of which ``readme_tables.py`` makes the table in ``docs/vllm-versions.md``.
It is an error when packed rows or greedy tokens differ, or the start-up line does.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

from vllm_neuron_rmsq.cli import smollm2

ROOT = Path(__file__).parents[1]
MODES = ("eager", "compiled")


def fingerprint(python: str, checkpoint: Path, mode: str, fuse: bool) -> dict[str, Any]:
    """Return what ``tests/vllm_fingerprint.py`` says in the environment of ``python``.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    script = [str(ROOT / "tests/vllm_fingerprint.py"), str(checkpoint), mode, str(int(fuse))]
    # Not in the repository: its folder would be looked at first, and hold the package.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_RMSQ_")}
    done = subprocess.run(
        [python, *script], capture_output=True, text=True, cwd=ROOT / "tests", env=clean, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{python} {' '.join(script)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def compare(here: dict[str, Any], there: dict[str, Any]) -> dict[str, str]:
    """Return in words how the packed rows, tokens and log-probabilities of two fingerprints compare."""
    layers = dict.fromkeys([*here["rows"], *there["rows"]])
    wrong = [name for name in layers if here["rows"].get(name) != there["rows"].get(name)]
    rows = f"equal in {len(layers)} layers" if layers else "-"
    if wrong:
        rows = f"differ in {len(wrong)} of {len(layers)} layers, first in {wrong[0]}"
    pairs = [
        (a, b)
        for ours, theirs in zip(here["logprobs"], there["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    count = sum(len(tokens) for tokens in here["tokens"])
    return {
        "packed rows": rows,
        "greedy tokens": f"equal, all {count}" if here["tokens"] == there["tokens"] else "differ",
        "logprobs": "equal" if all(a == b for a, b in pairs) else f"{max(abs(a - b) for a, b in pairs):.2g}",
    }


def main(*pythons: str) -> None:
    checkpoint = smollm2.fp8(ROOT / ".cache")
    here = {
        (mode, fuse): fingerprint(sys.executable, checkpoint, mode, fuse)
        for mode, fuse in itertools.product(MODES, (True, False))
    }
    lines, failed = [], []
    for python, ((mode, fuse), ours) in itertools.product(pythons, here.items()):
        theirs = fingerprint(python, checkpoint, mode, fuse)
        found = compare(ours, theirs)
        run = {"vllm": theirs["vllm"], "torch": theirs["torch"], "mode": mode, "fuse": str(int(fuse))}
        fused = re.match(r"\d+ of \d+ RMSNorm layers", theirs["report"])
        lines.append({**run, "fused": fused[0] if fused else "none", **found})
        wrong = any("differ" in found[what] for what in ("packed rows", "greedy tokens"))
        if wrong or ours["report"] != theirs["report"]:
            failed.append(f"{run}: {found}; {theirs['report']}, here {ours['report']}")
    common.report("vllm_versions", lines)
    if failed:
        sys.exit("Another vLLM does not compute what the one here does:\n" + "\n".join(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
