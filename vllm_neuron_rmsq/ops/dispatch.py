"""How an op finds its backend.

Each op's file makes an :class:`Op`. For every backend in the registry the op has an overload of the
backend's name (``-`` becomes ``_``, as PyTorch wants it) in the namespace ``torch.ops.neuron_rmsq``. The
overload calls the backend's functions; those of a backend without any are registered from C++
(``kernels/cpu/*_op.cpp``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_neuron_rmsq import backends, settings, target
from vllm_neuron_rmsq.backends import Backend, Functions

NAMESPACE = "neuron_rmsq"

_library = torch.library.Library(NAMESPACE, "DEF")
_ops: list[Op] = []


class Op:
    """An op and its overloads.

    Args:
        name: as in ``torch.ops.neuron_rmsq.<name>``.
        schema: arguments and results, in PyTorch's schema language. Positional: the dispatcher takes half a
            microsecond longer to find arguments by name.
        compute: ``(functions, *arguments)`` by a backend's functions.
        fake: ``(backend, *arguments)`` to results of the right shape and dtype, without data.
        has: which backends have it.

    Attributes:
        overloads: the overload of each backend, by its name. Looking one up here and not under ``torch.ops``
            saves half a microsecond a call.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        has: Callable[[Backend], bool] = lambda backend: True,
    ) -> None:
        self.name, self.schema, self.has = name, schema, has
        self._compute, self._fake = compute, fake
        self.overloads: dict[str, torch._ops.OpOverload] = {}
        for backend in map(backends.get, backends.names()):
            self.define(backend)
        _ops.append(self)

    def define(self, backend: Backend) -> None:
        """Add the overload of a backend, if the op has one and it is not there yet."""
        if backend.name in self.overloads or not self.has(backend):
            return
        overload = backend.name.replace("-", "_")
        name = f"{self.name}.{overload}"
        _library.define(name + self.schema)
        fake = functools.partial(self._fake, backend)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        if backend.functions is not None:
            compute = _calling(self._compute, backend.functions)
            _library.impl(name, compute, "CompositeExplicitAutograd")
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self.overloads[backend.name] = getattr(packet, overload)


def _calling(compute: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    """``compute`` with its first argument in place: a function, which is what ``Library.impl`` takes."""

    def implementation(*arguments: Any) -> Any:
        return compute(functions, *arguments)

    return implementation


# Settings do not change while a graph is compiled: torch.compile may take these for constants.
@torch.compiler.assume_constant_result
def backend(name: str | None, device_type: str) -> str:
    """Return the name of the backend to call: the one named, else the setting in force.

    ``off`` is a setting of serving; ops called all the same take ``auto``.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailableError: the backend cannot run here.
    """
    if name is None:
        name = settings.current().backend
        if name == "off":
            name = "auto"
    found = backends.resolve(name, device_type)
    if found not in _ops[0].overloads:  # registered after this package was imported
        for op in _ops:
            op.define(backends.get(found))
    return found


@torch.compiler.assume_constant_result
def traced(name: str) -> bool:
    """Whether a graph must hold what the functions of backend ``name`` call, and not the op's overload."""
    return backends.get(name).traced()


def functions(name: str) -> Functions:
    """Return the functions of a backend that has some."""
    found = backends.get(name).functions
    assert found is not None
    return found


def fp8_max(chosen: target.Target | str | None) -> float:
    """Return R of a target, of the setting in force for ``None``; a schema takes numbers, not objects.

    Raises:
        ValueError: there is no target of that name.
    """
    # Not below: torch 2.11 cannot hand a frozen dataclass to a function whose result is taken for constant.
    return chosen.fp8_max if isinstance(chosen, target.Target) else _fp8_max(chosen)


@torch.compiler.assume_constant_result
def _fp8_max(name: str | None) -> float:
    return target.get(settings.current().target if name is None else name).fp8_max


def scale_tensor(static_scale: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A given scale as one fp32 element on the device of ``like``."""
    if isinstance(static_scale, torch.Tensor):
        return static_scale
    return torch.full((1,), static_scale, dtype=torch.float32, device=like.device)
