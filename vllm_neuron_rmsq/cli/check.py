"""What ``vllm-neuron-rmsq check`` prints: the answers of :mod:`vllm_neuron_rmsq.check` as tables."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_environment(found: dict[str, Any], console: Console) -> None:
    """Print what :func:`~vllm_neuron_rmsq.check.environment` found, and whether the plugin is active."""
    installed = Table("package", "version", title=f"Python {found['python']} on {found['machine']}")
    installed.add_row("vllm-neuron-rmsq", found["plugin"])
    for name, version in found["packages"].items():
        installed.add_row(name, version or "not installed")
    installed.add_row("C++ compiler", found["compiler"] or "none found; native kernels cannot be built here")
    console.print(installed)
    if found["vllm"]:
        console.print(_vllm(found["vllm"], found["cpu"]))
    settings = found["settings"] or {}
    title = ", ".join(f"VLLM_RMSQ_{key.upper()}={settings[key]}" for key in ("backend", "target") if settings)
    backends = Table("backend", "on this machine", title=title or None)
    for name, backend in found["backends"].items():
        backends.add_row(name, escape(backend["reason"] or _how(backend)))
    if found["backends"]:
        console.print(backends)
    if found["neuron"]:
        neuron = Table("vLLM Neuron", "on this machine")
        for topic, said in found["neuron"].items():
            neuron.add_row(topic, escape(said))
        console.print(neuron)
    if found["active"]:
        console.print("The plugin is active when vLLM starts.")
    for reason in found["reasons"]:
        console.print(f"The plugin would do nothing: {reason}", markup=False, soft_wrap=True)


def _vllm(vllm: dict[str, Any], cpu: dict[str, Any]) -> Table:
    table = Table("vLLM", "on this machine")
    table.add_row("version", f"{vllm['version']}; the plugin takes {vllm['supported']}")
    table.add_row("platform", vllm["platform"] or "not asked")
    table.add_row("its names that are needed", escape("; ".join(vllm["missing"])) or "all there")
    for name, what in vllm["patches"].items():
        table.add_row(f"patch {name}", what)
    if cpu.get("ranks") is not None:
        bound = "; ".join(", ".join(map(str, cpus)) for cpus in cpu["ranks"]) or "none, threads are not bound"
        left = ", ".join(map(str, cpu["reserved"])) or "none"
        table.add_row("CPUs of a rank's threads", f"{bound} of {cpu['usable']}; left to the rest: {left}")
    return table


def _how(backend: dict[str, Any]) -> str:
    text = "can run" if backend["serves"] else "can run, when asked for by name"
    return f"{text}: {backend['details']}" if backend["details"] else text


def show_model(path: str, report: dict[str, Any], console: Console) -> None:
    """Print the report of a model: a row for each kind of layer, its number in the model left out."""
    console.print(f"{path}: {report['summary'] or report['reason']}", markup=False, soft_wrap=True)
    if "norms" not in report:  # vLLM Neuron's: taken as a whole, or not
        return
    table = Table("layer", "how many", "what would become of it")
    rows: dict[tuple[str, str], int] = {}
    for layer in (*report["norms"], *report["activations"]):
        fused = f"fused, feeds {', '.join(layer['linears'])}"
        fate = f"stock: {layer['reason']}" if layer["reason"] else fused
        key = (_kind(layer["name"]), _kind(fate))
        rows[key] = rows.get(key, 0) + 1
    for linear in report["linears"]:
        packed = f"multiplies packed rows, scheme {linear['scheme']}"
        fate = packed if linear["scheme"] else f"stock: {linear['reason']}"
        key = (_kind(linear["name"]), _kind(fate))
        rows[key] = rows.get(key, 0) + 1
    for (name, fate), count in rows.items():
        table.add_row(escape(name), str(count), escape(fate))
    console.print(table)


def _kind(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def does_something(report: dict[str, Any]) -> bool:
    """Whether a model's report has a layer or a linear that the plugin takes over."""
    if "reason" in report:  # vLLM Neuron's
        return not report["reason"]
    counts = report["counts"]
    return bool(counts["fused_norms"] or counts["fused_activations"] or counts["packed_linears"])
