"""Backend ``cpu``: the native kernels of ``kernels/cpu``, built when the package was installed.

Loading the library registers them as the CPU implementations of ``torch.ops.neuron_rmsq.*.cpu``.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_cpu_kernels.so"


@functools.cache
def _load() -> ctypes.CDLL:
    torch.ops.load_library(str(LIBRARY))
    return ctypes.CDLL(str(LIBRARY))


def unavailable() -> str | None:
    if not LIBRARY.exists():
        return "the native CPU kernels were not built"
    _load()
    return None


def set_isa(name: str) -> None:
    if _load().rmsq_set_isa(name.encode()):
        raise ValueError(name)


def prepacked_shape(n: int, h: int) -> tuple[int, int, int]:
    """Blocks of 32 outputs, pairs along H, bytes of a pair: the layout of ``kernels/cpu/packed_fp8_matmul.h``."""
    return -(-n // 32), -(-h // 2), 64
