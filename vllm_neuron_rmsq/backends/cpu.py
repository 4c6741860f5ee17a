"""Backend ``cpu``: the native kernels of ``kernels/cpu``, built when the package was installed.

Loading the library registers them as the CPU implementations of ``torch.ops.neuron_rmsq.*.cpu``. One library
holds every instruction-set level and runs the best one this machine has, or the one the setting ``cpu_isa``
(``VLLM_RMSQ_CPU_ISA``) names. All levels compute the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch

from vllm_neuron_rmsq.backends.base import Backend, Counts
from vllm_neuron_rmsq.kernels.cpu.digest import MARK, digest

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction-set levels, best last."""

LIBRARY = Path(__file__).parents[1] / "_cpu_kernels.so"
REASON = LIBRARY.with_suffix(".txt")
"""Written by the build where it could not make the library."""

REMEDY = "reinstall with pip install --no-build-isolation beside torch >= 2.11 and a C++17 compiler"


@functools.cache
def _load() -> ctypes.CDLL:
    # Before it is loaded, which registers what it has under the names of our ops.
    built_from = re.search(rf"{MARK}(\w+)".encode(), LIBRARY.read_bytes())
    if built_from is None or built_from[1].decode() != digest():
        raise OSError("they were built from other sources than those installed beside them")
    torch.ops.load_library(str(LIBRARY))
    library = ctypes.CDLL(str(LIBRARY))
    library.rmsq_best_isa.restype = library.rmsq_isa.restype = ctypes.c_char_p
    return library


def unavailable() -> str | None:
    """Return why there are no native kernels here, or ``None``.

    Whether the library can be loaded is found out by loading it, which changes nothing but that.
    """
    if not LIBRARY.exists():
        reason = REASON.read_text().strip() if REASON.exists() else "the package was never installed here"
        return f"the native CPU kernels were not built: {reason}; {REMEDY}"
    try:
        _load()
    except OSError as error:
        return f"the native CPU kernels cannot be loaded: {error.__cause__ or error}; {REMEDY}"
    return None


def isas() -> tuple[str, ...]:
    """Return the instruction-set levels this machine has, best last."""
    best = _load().rmsq_best_isa().decode()
    return ISAS[: ISAS.index(best) + 1]


def isa() -> str:
    """Return the instruction-set level in force."""
    return _load().rmsq_isa().decode()


def set_isa(name: str) -> None:
    """Run the kernels of instruction-set level ``name`` from now on; ``"auto"`` is the best.

    Raises:
        ValueError: this machine has no such level.
    """
    if _load().rmsq_set_isa(name.encode()):
        raise ValueError(
            f"cpu_isa: expected auto or one this machine has ({', '.join(isas())}); got {name!r}"
        )


def counts() -> Counts:
    """Return how many rows the kernels have quantized in this process: one addition a call tells it."""
    rows, invalid = ctypes.c_int64(), ctypes.c_int64()
    _load().rmsq_counts(ctypes.byref(rows), ctypes.byref(invalid))
    return Counts(rows.value, invalid.value)


def prepacked_shape(n: int, h: int, blocks: bool) -> tuple[int, int, int]:
    """``[blocks of 32 outputs, pairs along H, 64]``, the layout in ``kernels/cpu/packed_fp8_linear.h``."""
    return -(-n // 32), -(-h // 2), 64


BACKEND = Backend(
    name="cpu",
    # Looked up when asked: tests put other functions and paths in their place.
    unavailable=lambda: unavailable(),
    functions=None,
    devices=("cpu",),
    serves=("cpu",),
    prepacked_shape=prepacked_shape,
    details=lambda: f"instruction sets {', '.join(isas())}",
    level=isa,
    counts=counts,
)
