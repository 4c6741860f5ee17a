"""Runs kernels written for AWS's ``nki`` (NKI 0.6) on NumPy, and holds them to Trainium2's rules.

``simulate(kernel, grid=None)(*arrays)`` computes what the kernel computes; ``cost(kernel, grid=None)``
models what it costs, and ``scheduled_us`` says that in one number; under ``as_nki()`` a kernel published
elsewhere imports and runs unmodified.

What broke a rule raises :class:`NkiSimulationError`, what is doubtful on the hardware warns with
:class:`NkiSimulationWarning` when the kernel has run, what is not covered raises NotImplementedError.
"""

from .cost_model import CostReport
from .errors import NkiSimulationError, NkiSimulationWarning
from .language_rules import check_language
from .run import Zeros, as_nki, cost, scheduled_us, simulate

__all__ = [
    "CostReport",
    "NkiSimulationError",
    "NkiSimulationWarning",
    "Zeros",
    "as_nki",
    "check_language",
    "cost",
    "scheduled_us",
    "simulate",
]
