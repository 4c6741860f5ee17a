"""Backend ``nki-sim``: backend ``nki`` with every kernel launched into the simulator, on a CPU.

For seeing what Trainium computes, not for speed. The launch is that of :mod:`vllm_neuron_rmsq.backends.nki`,
on one NeuronCore unless NEURON_LOGICAL_NC_CONFIG says 2. The simulated matmul reads codes as
``float8_e4m3fn``, of which every valid code of either target is one, so it multiplies whatever the other
backends multiply.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from vllm_neuron_rmsq.backends import neuron_binding, nki
from vllm_neuron_rmsq.backends.base import Backend
from vllm_neuron_rmsq.target import TRN2, TRN3


def _cores() -> int:
    return neuron_binding.lnc()[0] if "NEURON_LOGICAL_NC_CONFIG" in os.environ else 1


def unavailable() -> str | None:
    """Return what the simulator lacks, or ``None``."""
    for package in ("numpy", "ml_dtypes"):
        if importlib.util.find_spec(package) is None:
            return f"the simulator needs {package}; pip install {package}"
    return None


def _simulated(kernel: str, arguments: dict[str, Any]) -> Any:
    from vllm_neuron_rmsq.kernels.nki.simulator import simulate

    device = next(iter(arguments.values())).device
    if device.type != "cpu":
        raise ValueError(f"backend nki-sim: expected tensors on the CPU, got {device}")
    target = TRN3 if arguments["ocp"] else TRN2
    with torch.no_grad():
        return simulate(neuron_binding.kernel(kernel), _cores(), target=target.name)(**arguments)


BACKEND = Backend(
    name="nki-sim",
    unavailable=lambda: unavailable(),
    functions=nki.Kernels(_simulated, _cores, lambda: TRN3),
    prepacked_shape=nki.prepacked_shape,
)
