"""The simulator's ``nki.isa``: each instruction checks its operands, computes in one NumPy step, is costed.

One module for each engine; ``instruction.py`` has what they share. Semantics and limits after
nki/api/nki/isa/__init__.py of aws-neuron-sdk (NKI 0.6), Trainium2.
"""

from __future__ import annotations

from typing import Any

from ...errors import NkiSimulationError as NkiValidationError
from ...errors import NotCovered
from ...tensor import VirtualRegister
from . import constants
from .constants import (
    dge_mode,
    dma_engine,
    engine,
    get_nc_sub_version,
    get_nc_version,
    gpsimd_engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
    scalar_engine,
    tensor_engine,
    unknown_engine,
    vector_engine,
)
from .copies import memset, nc_stream_shuffle, tensor_copy
from .dma import core_barrier, dma_compute, dma_copy, dma_transpose, sendrecv
from .gpsimd import affine_select, iota, nonzero_with_count
from .instruction import NkiInstruction
from .registers import register_alloc, register_load, register_move, register_store
from .scalar import activation, activation_reduce
from .tensor import nc_matmul, nc_transpose
from .vector import (
    bn_aggr,
    bn_stats,
    reciprocal,
    scalar_tensor_tensor,
    tensor_reduce,
    tensor_scalar,
    tensor_scalar_reduce,
    tensor_tensor,
    tensor_tensor_scan,
)
from .vector_select import (
    max8,
    nc_find_index8,
    nc_match_replace8,
    range_select,
    select_reduce,
    tensor_copy_predicated,
)

__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "constants",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "engine",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "scalar_engine",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "unknown_engine",
    "vector_engine",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotCovered(f"nki.isa.{name}")
