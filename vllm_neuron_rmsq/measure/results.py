"""Results as a history: lines of a CSV file, each with when and on what it was measured."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq import __version__

RUN_COLUMNS = ("date", "machine", "commit", "versions")


def this_run() -> dict[str, str]:
    """When and on what a line was measured: :data:`RUN_COLUMNS`.

    The commit is that of the checkout this package is in; installed, its version.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    top = _output([*git, "rev-parse", "--show-prefix"])
    commit = _output([*git, "rev-parse", "--short", "HEAD"]) if top == "vllm_neuron_rmsq/measure/" else ""
    if commit and _output([*git, "status", "--porcelain", "--", ":/", ":!/benchmarks/results"]):
        commit += " and changes"
    values = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        f"{processor()}, {os.cpu_count()} cores",
        commit or f"version {__version__}",
        f"vllm {version('vllm')}, torch {version('torch')}",
    )
    return dict(zip(RUN_COLUMNS, values, strict=True))


def version(package: str) -> str:
    """Version of an installed package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Name of this machine's processor."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return model


def text(value: object) -> str:
    """A value as tables and files have it; floats keep three digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file, each by its columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Append ``lines`` to a CSV file that may have other columns, or may not be there yet."""
    before = read(path) if path.exists() else []
    columns = list(dict.fromkeys(column for line in (*before, *lines) for column in line))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *lines])


def figure_of(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "a picture needs matplotlib, which is not installed; pip install 'vllm-neuron-rmsq[plot]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn in the end: before minutes are spent on what it would show.

    Raises:
        ValueError: matplotlib is not installed, the name is none of a picture, or there is no such directory.
    """
    kinds = figure_of(1, 1)[0].canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"{path}: expected the name of a picture, .png or another of {', '.join(kinds)}")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise ValueError unless the directory that a file is to be written in is there."""
    if path.is_dir() or not path.parent.is_dir():
        why = "is a directory" if path.is_dir() else f"{path.parent} is no directory"
        raise ValueError(f"{path}: cannot be written, {why}; choose another place")


def save(figure: Any, path: Path) -> None:
    """Write a picture.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""
