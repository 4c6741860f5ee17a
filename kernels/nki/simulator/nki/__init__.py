"""The simulator's ``nki`` package, with ``nki.isa`` and ``nki.language``."""

from __future__ import annotations

from typing import Any

from .. import run as _run
from ..errors import NotCovered
from ..run import Kernel
from . import isa, language, typing

__all__ = ["Kernel", "dtype", "isa", "jit", "language", "simulate", "typing"]

dtype = str  # what annotations call the dtypes of nki.language, which are strings


def jit(fn: Any = None, **kwargs: Any) -> Any:
    """Mark `fn` as a kernel. Compiler options are accepted and have no meaning here."""
    if fn is None:
        return lambda function: Kernel(function)
    return fn if isinstance(fn, Kernel) else Kernel(fn)


def simulate(kernel: Any) -> Any:
    """As ``nki.simulate``: a callable that runs `kernel` (or ``kernel[lnc]``) on arrays."""
    return _run.simulate(kernel)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotCovered(f"nki.{name}")
