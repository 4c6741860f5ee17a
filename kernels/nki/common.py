"""What the kernels share: a program's part of the work, the target's FP8, copies on every partition."""

try:
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

SCALE_BYTES = 4
"""Bytes of the fp32 scale at the end of a packed row."""

SHUFFLE_FROM = 32  # elements from which on VectorE, not DMA, copies a vector to all partitions


def share(count: int):
    """Return the part ``first, last`` (``first <= i < last``) of ``count`` items that is this program's.

    Programs get as many as divides evenly, the first ones one more. Without a grid there is one program.
    """
    programs, program = program_count(), 0
    if programs > 1:
        program = nl.program_id(0)
    each, extra = count // programs, count % programs
    first = program * each + min(program, extra)
    return first, first + each + (1 if program < extra else 0)


def program_count() -> int:
    """Return the programs of the grid; 1 without one, where ``num_programs`` is not asked."""
    assert nl.program_ndim() <= 1, f"grid: expected none or one dimension, got {nl.program_ndim()}"
    if nl.program_ndim() == 0:
        return 1
    return nl.num_programs()


def fp8_dtype(ocp: bool):
    """Return the FP8 a target's engines read: float8_e4m3fn (OCP, ±448, Trainium3) or float8_e4m3 (±240)."""
    return nl.float8_e4m3fn if ocp else nl.float8_e4m3


def fp8_max(ocp: bool) -> float:
    """Return that FP8's largest value."""
    return 448.0 if ocp else 240.0


def copy_to_partitions(dst: nl.NkiTensor, vector: nl.NkiTensor, start: int):
    """Copy a part of a vector in HBM to every partition of a tile, bit for bit.

    By DMA to the first partition, and from there by VectorE, 32 partitions at a time. A DMA to all of them
    moves the vector as often as there are partitions: a tenth of the weight's bytes for the weight's scales.

    Args:
        dst: ``[P, n]`` in SBUF, of vector's dtype.
        vector: ``[N]`` or ``[1, N]`` in HBM.
        start: first element of the part.
    """
    partitions, n = dst.shape
    row = vector.reshape((1, vector.size))[:, start : start + n]
    if partitions == 1 or n < SHUFFLE_FROM:
        nisa.dma_copy(dst=dst, src=row.broadcast(0, partitions))
        return
    nisa.dma_copy(dst=dst[0:1, :], src=row)
    for first in range(0, partitions, 32):
        nisa.nc_stream_shuffle(
            dst=dst[first : min(first + 32, partitions), :], src=dst[0:1, :], shuffle_mask=[0] * 32
        )
