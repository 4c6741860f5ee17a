"""The backends: one file and one record for each way to compute the contract, and the registry of them.

A new backend is a module here that holds a :class:`Backend`, and its name in :data:`_IN_TREE`; settings'
choices, the ops' overloads, ``check``'s rows and the tests follow from the registry.
"""

from __future__ import annotations

import functools

from vllm_neuron_rmsq.backends import cpu, nki, nki_sim, torch
from vllm_neuron_rmsq.backends.base import (
    Backend,
    BackendUnavailableError,
    Counts,
    Functions,
)

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Counts",
    "Functions",
    "for_serving",
    "get",
    "names",
    "register",
    "resolve",
    "unavailable",
]

_IN_TREE = (nki, nki_sim, cpu, torch)
"""Modules of this release's backends; ``auto`` takes the first that fits."""

_registry: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend, behind those that are there: settings accept its name and ops run on it from now on.

    Raises:
        ValueError: there is a backend of that name, or the name means something else to the settings.
    """
    if backend.name in (*_registry, "auto", "off"):
        raise ValueError(f"backend: expected a name that is not taken, got {backend.name!r}")
    _registry[backend.name] = backend
    resolve.cache_clear()


for _module in _IN_TREE:
    _registry[_module.BACKEND.name] = _module.BACKEND


def names() -> tuple[str, ...]:
    """Return the name of every backend."""
    return tuple(_registry)


def get(name: str) -> Backend:
    """Return the record of a backend.

    Raises:
        ValueError: ``name`` is no backend.
    """
    if name not in _registry:
        raise ValueError(f"backend: expected one of auto, {', '.join(_registry)}; got {name!r}")
    return _registry[name]


def unavailable(name: str) -> str | None:
    """Return why backend ``name`` cannot run here, with the remedy, or ``None`` when it can."""
    return get(name).unavailable()


@functools.cache
def resolve(name: str, device_type: str) -> str:
    """Turn a backend's name or ``auto`` into the name of a backend that can run.

    The answer is remembered: every call of an op asks.

    Args:
        name: ``auto``, the first backend for the device that can run, or a backend's name.
        device_type: ``torch.device.type`` of the tensors.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailableError: the backend cannot run here, or none computes on the device.
    """
    if name == "auto":
        candidates = [n for n, backend in _registry.items() if device_type in backend.devices]
        if not candidates:
            raise BackendUnavailableError(
                f"no backend computes on device {device_type!r}; name one of {', '.join(_registry)}"
            )
        name = next((n for n in candidates if unavailable(n) is None), candidates[-1])
    get(name)
    reason = unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    return name


def for_serving(name: str, device_type: str) -> tuple[str | None, str]:
    """Say which backend replaces vLLM's layers on a device, if any should.

    Unlike :func:`resolve`, ``auto`` means none where no backend is faster than vLLM's own kernels: a GPU's
    would lose to plain torch, and an installed plugin must not keep vLLM from starting on any device.

    Args:
        name: the setting: ``auto``, ``off`` or a backend's name.
        device_type: vLLM's platform, as in ``torch.device.type``.

    Returns:
        the backend's name and an empty string, or ``None`` and the reason.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    if name == "off":
        return None, "is switched off (VLLM_RMSQ_BACKEND=off)"
    if name != "auto":
        return resolve(name, device_type), ""
    for candidate, backend in _registry.items():
        if device_type in backend.serves and unavailable(candidate) is None:
            return candidate, ""
    return None, f"has no fast backend for {device_type}; VLLM_RMSQ_BACKEND names one to use all the same"
