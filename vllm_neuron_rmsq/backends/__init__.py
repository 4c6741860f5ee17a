"""One module for each way to compute the contract, all with the same few functions.

A backend module has
    ``unavailable() -> str | None``: why it cannot run here and what to do about it, or ``None``;
    ``rms_norm_quant(hidden, weight, static_scale, eps, lower_bound, fp8_max) -> Tensor`` and
    ``add_rms_norm_quant(hidden, residual, weight, static_scale, eps, lower_bound, fp8_max)
    -> (Tensor, Tensor)``: the norm ops, on arguments that ``ops`` has checked;
    ``packed_fp8_linear(packed, weight, weight_scale, bias, out_features, out_dtype) -> Tensor``: the matmul
    op, ``weight`` being ``[N, H]`` uint8, or, where the backend wants a layout of its own,
    what ``prepack_fp8_weight(weight) -> Tensor`` returned, of ``prepacked_shape(n, h)``, uint8.
A backend whose ops are registered from C++ has only the first and ``prepacked_shape``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from vllm_neuron_rmsq.settings import BACKENDS

AUTO_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
"""Which backends ``auto`` tries for a device type, best first; any other device is Neuron's."""


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run here; the message says why and what to do."""


def module(name: str) -> ModuleType:
    """Return the module of backend ``name``."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


@functools.cache
def unavailable(name: str) -> str | None:
    """Return why backend ``name`` cannot run here, with the remedy, or ``None`` when it can."""
    try:
        return module(name).unavailable()
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name.replace('-', '_')}":
            raise
        return f"this release has no backend {name!r}; choose another with VLLM_RMSQ_BACKEND"


@functools.cache
def resolve(name: str, device_type: str) -> str:
    """Turn a backend setting into the name of a backend that can run.

    Args:
        name: ``auto`` or a backend's name.
        device_type: ``torch.device.type`` of the tensors.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailableError: the backend cannot run here.
    """
    if name == "auto":
        candidates = AUTO_ORDER.get(device_type, ("nki",))
        for candidate in candidates[:-1]:
            if unavailable(candidate) is None:
                return candidate
        name = candidates[-1]
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    reason = unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    return name


def forget() -> None:
    """Ask the backends anew from now on: what they answer may hang on settings, which have changed."""
    unavailable.cache_clear()
    resolve.cache_clear()


def for_serving(name: str, device_type: str) -> tuple[str | None, str]:
    """Say which backend replaces vLLM's layers on a device, if any should.

    Unlike :func:`resolve`, ``auto`` means none where no backend is faster than vLLM's own kernels: a GPU's
    would lose to plain torch, and an installed plugin must not keep vLLM from starting on any device.

    Args:
        name: the backend setting.
        device_type: vLLM's platform, as in ``torch.device.type``.

    Returns:
        the backend's name and an empty string, or ``None`` and the reason.

    Raises:
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    if name == "off":
        return None, "is switched off (VLLM_RMSQ_BACKEND=off)"
    if name != "auto":
        return resolve(name, device_type), ""
    for candidate in AUTO_ORDER.get(device_type, ("nki",)):
        if (candidate != "torch" or device_type == "cpu") and unavailable(candidate) is None:
            return candidate, ""
    return None, f"has no fast backend for {device_type}; VLLM_RMSQ_BACKEND names one to use all the same"
