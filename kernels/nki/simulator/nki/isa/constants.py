"""Enumerations of ``nki.isa``, and which NeuronCore is simulated."""

from __future__ import annotations

from enum import Enum, IntEnum

from ... import machine as _machine


class engine(Enum):
    """Engines of a NeuronCore."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0


tensor_engine, vector_engine, scalar_engine = engine.tensor, engine.vector, engine.scalar
gpsimd_engine, unknown_engine = engine.gpsimd, engine.unknown


class reduce_cmd(Enum):
    """What an instruction does with the engine's accumulator registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """Who makes a DMA's descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What an out-of-bounds index of an indirect DMA does."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    """TensorE's performance modes."""

    none = "none"
    double_row = "double_row"


class nc_version(IntEnum):
    """NeuronCore generations, in order."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    """Who moves the data of a sendrecv."""

    dma = 1
    gpsimd_dma = 2


def get_nc_version() -> nc_version:
    """The generation simulated."""
    return nc_version[_machine.target().generation]


def get_nc_sub_version() -> int:
    """The first revision."""
    return 0
