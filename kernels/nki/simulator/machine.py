"""The NeuronCore a kernel runs on: who runs, how much SBUF and PSUM is live, what was issued."""

from __future__ import annotations

import gc
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import hardware
from .errors import NkiSimulationError, NkiSimulationWarning, fail, kernel_line
from .hazards import Places


class Pool:
    """Live bytes per partition of SBUF or PSUM, and the highest they rose."""

    def __init__(self, name: str, capacity: int, unit: int = 1) -> None:
        self.name = name
        self.capacity = capacity
        self.unit = unit  # tensors placed by the compiler take multiples of it
        self.reserved = 0  # high-water mark of tensors placed by explicit address
        self.used = 0  # of tensors placed by the compiler
        self.peak = 0
        self.peak_at = ""
        self._live: dict[int, tuple[int, str, int]] = {}
        self._places = Places()

    def take(self, key: int, nbytes: int, label: str) -> int:
        """Count `nbytes` per partition for tensor `key`, and place it; error when the memory is full."""
        nbytes = -(-nbytes // self.unit) * self.unit
        if self.reserved + self.used + nbytes > self.capacity:
            gc.collect()  # tensors in reference cycles are dead too
        total = self.reserved + self.used + nbytes
        if total > self.capacity:
            largest = sorted(self._live.values(), reverse=True)[:4]
            held = "; ".join(f"{size} B {what}" for size, what, _ in largest)
            fail(
                "nki.language.ndarray",
                label,
                f"at most {self.capacity} B of {self.name} per partition in use",
                f"{total} B ({nbytes} B more on top of {total - nbytes} B: {held})",
            )
        self.used += nbytes
        place = self._places.take(nbytes, self.capacity - self.reserved)
        self._live[key] = (nbytes, label, place)
        self._note()
        return place

    def give(self, key: int) -> None:
        """The tensor `key` is gone."""
        nbytes, _, place = self._live.pop(key)
        self.used -= nbytes
        self._places.give(place)

    def reserve(self, end: int) -> None:
        """An explicit address ending at byte `end` of the partition is in use from now on."""
        if end > self.reserved:
            if end + self.used > self.capacity:
                fail(
                    "nki.language.ndarray",
                    "address",
                    f"an end within the {self.capacity - self.used} B of {self.name} per partition "
                    "that are not taken by tensors without an address",
                    f"end at byte {end}",
                )
            self.reserved = end
            self._note()

    def _note(self) -> None:
        if self.reserved + self.used > self.peak:
            self.peak = self.reserved + self.used
            self.peak_at = kernel_line()


@dataclass
class Instruction:
    """An instruction that runs: its name in messages, and its engine (``dma`` for a DMA)."""

    name: str
    engine: str


class Machine:
    """One program of the launch grid on one NeuronCore."""

    def __init__(
        self, program: int, grid: tuple[int, ...], shared: Any, cost: Any, target: hardware.Target
    ) -> None:
        self.program = program
        self.grid = grid
        self.shared = shared
        self.cost = cost
        self.target = target
        self.sbuf = Pool("SBUF", self.target.sbuf_bytes)
        self.psum = Pool("PSUM", hardware.PSUM_BYTES, hardware.PSUM_BANK_BYTES)
        self.arenas: dict[str, Any] = {}
        self.registers: dict[str, Any] = {}
        self.instruction = Instruction("a kernel", "none")
        self.shared_allocations = 0
        self.cautions: Counter[str] = Counter()

    def caution(self, instruction: str, operand: str, expected: str, got: Any, count: int = 1) -> None:
        """Note something doubtful, `count` times; :func:`warn` tells of it when the launch has ended."""
        message = f"{instruction}: {operand}: expected {expected}, got {got}\n  at {kernel_line()}"
        self.cautions[message] += count


def warn(machines: Sequence[Machine]) -> None:
    """One NkiSimulationWarning for each thing and line of a kernel that was doubtful, with how often."""
    total: Counter[str] = Counter()
    for machine in machines:
        total.update(machine.cautions)
    for message, count in total.items():
        warnings.warn(f"{message} ({count} times)", NkiSimulationWarning, stacklevel=2)


_local = threading.local()


def current() -> Machine:
    """The machine of the running kernel. Raises NkiSimulationError outside of one."""
    machine = getattr(_local, "machine", None)
    if machine is None:
        raise NkiSimulationError("NKI call outside of a kernel: run it with simulate(kernel)(...)")
    return machine


def running() -> bool:
    """Whether a kernel runs on this thread."""
    return getattr(_local, "machine", None) is not None


def target() -> hardware.Target:
    """What the running kernel is simulated for; outside of one, what the next would be."""
    return current().target if running() else hardware.target()


@contextmanager
def on(machine: Machine) -> Iterator[Machine]:
    """Make `machine` the current one of this thread."""
    before = getattr(_local, "machine", None)
    _local.machine = machine
    try:
        yield machine
    finally:
        _local.machine = before
