"""A cost MODEL of a kernel run: what it issues, priced with published figures (``hardware.py``).

Two figures come of it. The schedule (``schedule.py``) has each engine run its instructions in program order
and wait for what they depend on: ``CostReport.scheduled_us``. The floor is the busy time of the busiest
engine, as if nothing ever waited: ``CostReport.time_us``, which no schedule of the program can beat.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import hardware
from . import machine as _machine
from .errors import kernel_line
from .hardware import ACCUMULATOR_READ, MEASURED, MIN_CYCLES, VECTOR_RECIPROCAL, Latencies
from .hazards import Region
from .schedule import DMA_IN, DMA_OUT, Program, Schedule, schedule

if TYPE_CHECKING:
    from .tensor import NkiTensor

ENGINES = {"tensor": "TensorE", "vector": "VectorE", "scalar": "ScalarE", "gpsimd": "GpSimdE"}
_HALF = ("bfloat16", "float16")


def cycles(elements: float, *tiles: NkiTensor) -> float:
    """Cycles to stream `elements` per lane at one a cycle; slower where a tile's innermost stride is wide."""
    slow = any(_innermost(t) * t.itemsize > hardware.WIDE_STRIDE_BYTES for t in tiles)
    return max(MIN_CYCLES, elements * (hardware.WIDE_STRIDE_SLOWDOWN if slow else 1))


def gpsimd_cycles(elements: float) -> float:
    """Cycles of a GpSimdE instruction that goes over `elements` per lane."""
    return hardware.GPSIMD_START + elements


def copy_cycles(engine: str, dst: NkiTensor, src: NkiTensor, op: str = "") -> float:
    """tensor_copy and tensor_scalar, with VectorE's performance modes."""
    n = dst.free_size
    if engine == "gpsimd":
        return gpsimd_cycles(n * (hardware.GPSIMD_RSQRT if op == "rsqrt" else 1))
    if engine == "scalar" or not _all((dst, src), _HALF):
        return cycles(n, dst, src)
    dense = _innermost(dst) == _innermost(src) == 1
    psum = (dst.buffer, src.buffer).count("psum")
    if dense and psum == 0:
        return cycles(n / hardware.VECTOR_COPY_SPEEDUP)
    if psum == 0 or (dense and psum == 1):
        return cycles(n / hardware.VECTOR_COPY_SPEEDUP_PARTLY)
    return cycles(n, dst, src)


def memset_cycles(engine: str, dst: NkiTensor, value: float) -> float:
    """memset: zeros of 16 bits go faster."""
    if engine == "gpsimd":
        return gpsimd_cycles(dst.free_size)
    speedup = hardware.VECTOR_ZERO_SPEEDUP if value == 0 and _all((dst,), _HALF) else 1
    return cycles(dst.free_size / speedup, dst)


def reduce_cycles(op: str, dst: NkiTensor, data: NkiTensor) -> float:
    """tensor_reduce, with its bf16 mode."""
    fast = op in ("add", "maximum") and _all((dst, data), ("bfloat16",))
    return cycles(data.free_size / (hardware.VECTOR_BF16_REDUCE_SPEEDUP if fast else 1), data)


def two_input_cycles(dst: NkiTensor, data1: NkiTensor, data2: NkiTensor, fast: bool = False) -> float:
    """An instruction that streams two tiles: N cycles where `fast` or just one of them is in PSUM."""
    apart = (data1.buffer, data2.buffer).count("psum") == 1
    return cycles(dst.free_size * (1 if fast or apart else hardware.TWO_INPUT_CYCLES), dst, data1, data2)


def pair_cycles(engine: str, dst: NkiTensor, data1: NkiTensor, data2: NkiTensor) -> float:
    """tensor_tensor, with VectorE's performance mode.

    [T2] gives the mode a width of 4 elements a lane and cycle for all 16-bit floats and operators: two
    streams of N take N / 2. :func:`careful_pair_cycles` has the other reading.
    """
    if engine == "gpsimd":
        return gpsimd_cycles(dst.free_size * hardware.TWO_INPUT_CYCLES)
    if _pair_mode(dst, data1, data2):
        return cycles(dst.free_size / hardware.VECTOR_PAIR_SPEEDUP, dst, data1, data2)
    return two_input_cycles(dst, data1, data2)


def careful_pair_cycles(engine: str, op: str, dst: NkiTensor, data1: NkiTensor, data2: NkiTensor) -> float:
    """The same with [T2]'s mode as twice the speed [E] has for NeuronCore-v2.

    That is N for contiguous bf16 added, subtracted or multiplied, and 2 N else.
    """
    if engine == "gpsimd" or not _pair_mode(dst, data1, data2):
        return pair_cycles(engine, dst, data1, data2)
    dense = _innermost(data1) == _innermost(data2) == 1
    bf16 = op in ("add", "subtract", "multiply") and dense and _all((dst, data1, data2), ("bfloat16",))
    return cycles(dst.free_size / (hardware.VECTOR_PAIR_SPEEDUP if bf16 else 1), dst, data1, data2)


def _pair_mode(dst: NkiTensor, data1: NkiTensor, data2: NkiTensor) -> bool:
    return data1.buffer == data2.buffer == "sbuf" and _all((dst, data1, data2), _HALF)


def scalar_pair_cycles(op0: str, op1: str, dst: NkiTensor, data: NkiTensor, operand1: NkiTensor) -> float:
    """scalar_tensor_tensor: as tensor_tensor ([ISA]), with a bf16 mode of its own ([E])."""
    bf16 = _all((data, operand1), ("bfloat16",)) and data.free_size % 2 == 0
    return two_input_cycles(dst, data, operand1, fast=bf16 and (op0, op1) == ("subtract", "multiply"))


def matmul_cycles(columns: int, elements: int, dtype: str, transpose: bool = False) -> float:
    """Average of many matmuls with `columns` of stationary and `elements` of moving free size."""
    factor = 1
    if dtype == "float32":
        factor = hardware.FP32_TRANSPOSE if transpose else hardware.FP32_MATMUL
    return factor * max(min(hardware.MATMUL_START, columns), elements)


def _all(tiles: Sequence[NkiTensor], names: Sequence[str]) -> bool:
    return all(t.dtype in names for t in tiles)


def dma(name: str, dst: NkiTensor, sources: list[NkiTensor], share: float = 1.0) -> None:
    """Note a DMA that reaches `share` of the bandwidth."""
    recorder = _machine.current().cost
    if recorder is not None:
        recorder.dma(name, dst, sources, share)


def _innermost(t: NkiTensor) -> int:
    """Stride of the innermost dimension that has more than one element."""
    for n, s in zip(t.shape[:0:-1], t.strides[:0:-1], strict=True):
        if n > 1:
            return s
    return 1


def _run_bytes(t: NkiTensor) -> int:
    """Bytes of the contiguous pieces a DMA meets in `t`."""
    run, first = 1, 1 if t.on_chip else 0
    for n, s in list(zip(t.shape, t.strides, strict=True))[: first - 1 if first else None : -1]:
        if n > 1 and s != run:
            break
        run *= n
    return run * t.itemsize


@dataclass
class EngineCost:
    """What one engine was busy with."""

    instructions: int = 0
    cycles: float = 0.0
    time_us: float = 0.0


@dataclass
class Recorder:
    """What one program (one NeuronCore) issued.

    bytes: by direction, ``HBM->SBUF``, ``SBUF->HBM``, ``SBUF->SBUF``, ``HBM->HBM`` (all by DMA), and
    ``on-chip``: what the compute engines read and wrote in SBUF and PSUM. instructions: how often each
    was issued, by ``(engine, name)``. careful_vector_us: VectorE's busy time under the slower reading of
    tensor_tensor's 16-bit mode (:func:`careful_pair_cycles`). peaks: the most bytes per partition live
    at once.
    """

    engines: dict[str, EngineCost] = field(default_factory=lambda: defaultdict(EngineCost))
    careful_vector_us: float = 0.0
    instructions: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    short_run_bytes: int = 0
    hbm_bytes: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    program: Program = field(default_factory=Program)
    reads: list[Region] = field(default_factory=list)
    writes: list[Region] = field(default_factory=list)
    _schedules: dict[tuple[bool, bool, Latencies], Schedule] = field(default_factory=dict)

    def issue(self, name: str, engine: str, busy: float, tiles: list[NkiTensor], careful: float) -> None:
        """An instruction of a compute engine: `busy` cycles, `careful` under the slower reading."""
        entry = self.engines[ENGINES[engine]]
        entry.instructions += 1
        entry.cycles += busy
        entry.time_us += busy / hardware.CLOCK_GHZ[ENGINES[engine]] / 1e3
        if engine == "vector":
            self.careful_vector_us += careful / hardware.CLOCK_GHZ["VectorE"] / 1e3
        self.instructions[ENGINES[engine], name] += 1
        self.bytes["on-chip"] += sum(t.nbytes for t in tiles)
        clock = hardware.CLOCK_GHZ[ENGINES[engine]] * 1e3
        shared_port = engine == "gpsimd" or (engine == "vector" and _fast_mode(name, tiles))
        self._add(name, ENGINES[engine], busy / clock, careful / clock, shared_port)

    def dma(self, name: str, dst: NkiTensor, sources: list[NkiTensor], share: float) -> None:
        """A DMA: its bytes are the larger of what it reads and what it writes."""
        moved = max(dst.nbytes, sum(t.nbytes for t in sources))
        entry = self.engines["DMA"]
        entry.instructions += 1
        entry.time_us += moved / (hardware.DMA_ENGINES * hardware.DMA_BYTES_PER_NS * share) / 1e3
        self.instructions["DMA", name] += 1
        for source in sources:
            self.bytes[f"{_side(source)}->{_side(dst)}"] += source.nbytes
        self.hbm_bytes += sum(t.nbytes for t in (dst, *sources) if not t.on_chip)
        if min(_run_bytes(t) for t in (dst, *sources)) < hardware.DMA_GOOD_RUN_BYTES:
            self.short_run_bytes += moved
        us = (
            moved
            * _waste(name, dst, sources)
            / (hardware.DMA_ENGINES * hardware.DMA_BYTES_PER_NS * share)
            / 1e3
        )
        self._add(name, DMA_IN if dst.on_chip else DMA_OUT, us, us, False)

    def _add(self, name: str, engine: str, us: float, careful_us: float, shared_port: bool) -> None:
        """Close an instruction: what was read and written since the last one is its doing."""
        self.program.add(name, engine, us, careful_us, shared_port, self.reads, self.writes, kernel_line())
        self.reads, self.writes = [], []

    def schedule(
        self, careful: bool = False, reorder: bool = False, latencies: Latencies = MEASURED
    ) -> Schedule:
        """When each instruction would run (``schedule.py``), computed once for each way to ask."""
        key = (careful, reorder, latencies)
        if key not in self._schedules:
            self._schedules[key] = schedule(self.program, *key)
        return self._schedules[key]

    @property
    def bound(self) -> str:
        """The busiest engine."""
        return max(self.engines, key=lambda name: self.engines[name].time_us, default="none")

    @property
    def time_us(self) -> float:
        """Busy time of the busiest engine: a floor of the program's latency."""
        return self.engines[self.bound].time_us if self.engines else 0.0


def _fast_mode(name: str, tiles: list[NkiTensor]) -> bool:
    """Whether VectorE runs `name` in a mode faster than NeuronCore-v2's, which takes GpSimdE's port too."""
    streamed = [t for t in tiles if t.free_size > 1]
    return (
        name in ("tensor_copy", "tensor_scalar", "tensor_tensor") and bool(streamed) and _all(streamed, _HALF)
    )


def _waste(name: str, dst: NkiTensor, sources: list[NkiTensor]) -> float:
    """How many times as long as at full bandwidth a transfer takes, for its shape."""
    if name == "dma_transpose":  # all engines together, a piece of [128, 16] at a time
        partitions, row = dst.shape[0], dst.shape[-1]
        pieces = -(-partitions // hardware.PARTITIONS) * -(-row // hardware.DMA_TRANSPOSE_ROW)
        return pieces * hardware.PARTITIONS * hardware.DMA_TRANSPOSE_ROW / (partitions * row)
    tensors = (dst, *sources)
    small = max(1.0, hardware.DMA_SMALL_RUN_BYTES / min(_run_bytes(t) for t in tensors))
    partitions = min((t.shape[0] for t in tensors if t.on_chip), default=hardware.PARTITIONS)
    engines = -(-partitions // hardware.DMA_PARTITIONS)
    return small * hardware.DMA_ENGINES / engines


def _side(t: NkiTensor) -> str:
    return "SBUF" if t.on_chip else "HBM"


class CostReport:
    """The cost MODEL of one launch: ``programs``, one per NeuronCore, and the ``worst`` of them."""

    def __init__(self, programs: list[Recorder]) -> None:
        self.programs = programs
        self.worst = max(programs, key=lambda p: p.time_us)

    def schedule(
        self, careful: bool = False, reorder: bool = False, latencies: Latencies = MEASURED
    ) -> Schedule:
        """The schedule of the program that takes longest (see :func:`schedule.schedule`)."""
        return max((p.schedule(careful, reorder, latencies) for p in self.programs), key=lambda s: s.us)

    @property
    def scheduled_us(self) -> float:
        """Scheduled time in microseconds, without the launch."""
        return self.schedule().us

    @property
    def careful_us(self) -> float:
        """The same under the slower reading of VectorE's 16-bit modes."""
        return self.schedule(careful=True).us

    @property
    def bound(self) -> str:
        """The busiest engine of the worst program."""
        return self.worst.bound

    @property
    def time_us(self) -> float:
        """Its busy time in microseconds."""
        return self.worst.time_us

    @property
    def engines(self) -> dict[str, EngineCost]:
        """Engines of the worst program."""
        return dict(self.worst.engines)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes moved per direction, all programs together."""
        total: Counter[str] = Counter()
        for program in self.programs:
            total.update(program.bytes)
        return dict(total)

    @property
    def dma_roofline_us(self) -> float:
        """Microseconds the DMA engines need for the worst program's bytes at full bandwidth."""
        moved = sum(n for direction, n in self.worst.bytes.items() if direction != "on-chip")
        return moved / (hardware.DMA_ENGINES * hardware.DMA_BYTES_PER_NS) / 1e3

    @property
    def hbm_roofline_us(self) -> float:
        """Microseconds the worst program's HBM traffic takes at its core's share of HBM bandwidth."""
        return self.worst.hbm_bytes / hardware.HBM_BYTES_PER_NS / 1e3

    def __str__(self) -> str:
        count = len(self.programs)
        lines = [
            "MODEL from published clock rates and bandwidths (Trainium2), not a measurement",
            f"programs: {count}; below, the slowest of them" if count > 1 else "programs: 1",
            f"scheduled: {self.scheduled_us:.1f} us; {self.careful_us:.1f} us under the careful reading of "
            "VectorE's 16-bit modes",
            str(self.schedule()),
            "busy time of each engine, as if nothing waited:",
            f"{'engine':10}{'instructions':>14}{'busy cycles':>16}{'busy time':>14}",
        ]
        for name in (*ENGINES.values(), "DMA"):
            if name in self.worst.engines:
                e = self.worst.engines[name]
                busy = f"{e.cycles:,.0f}" if e.cycles else "-"
                lines.append(f"{name:10}{e.instructions:>14,}{busy:>16}{e.time_us:>11.1f} us")
        if self.worst.careful_vector_us > self.worst.engines.get("VectorE", EngineCost()).time_us:
            lines.append(
                f"VectorE: {self.worst.careful_vector_us:.1f} us if tensor_tensor's 16-bit mode is twice the "
                "speed of NeuronCore-v2,\n  whose own was for bf16 add, subtract and multiply only"
            )
        lines += [f"{name:12}{n:>18,} B" for name, n in sorted(self.worst.bytes.items())]
        lines += [
            f"bound: {self.bound}, {self.time_us:.1f} us at least",
            f"DMA roofline: {self.dma_roofline_us:.1f} us; HBM roofline: {self.hbm_roofline_us:.1f} us",
            f"bytes in DMA runs under {hardware.DMA_GOOD_RUN_BYTES} B: {self.worst.short_run_bytes:,}",
        ]
        lines += [f"peak {name} per partition: {n:,} B" for name, n in self.worst.peaks.items()]
        return "\n".join(lines)


__all__ = ["ACCUMULATOR_READ", "VECTOR_RECIPROCAL", "CostReport", "EngineCost", "Recorder"]
