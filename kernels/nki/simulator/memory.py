"""Bytes behind tensors: which exist, which were written, and by which program.

An on-chip tensor is `partitions` rows of `row` bytes, `pitch` bytes apart (more than `row` only for a
tensor placed by address inside the arena, which is all of SBUF or PSUM). An HBM tensor is one long row.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from . import hardware
from . import machine as _machine
from .errors import fail

Strides = tuple[int, ...]
_serial = itertools.count()
SEVERAL = 255  # instead of one program + 1: more than one wrote the same, or reads


class Memory:
    """A run of bytes with a record of which were written and, when shared, which program touched them."""

    def __init__(self, data: np.ndarray, written: bool, programs: int = 1) -> None:
        self.data = data
        self.full = written
        self.matmul: np.ndarray | None = None  # PSUM: which bytes a matmul wrote last
        self._written: np.ndarray | None = None
        self._programs = programs
        self._writer: np.ndarray | None = None  # program + 1 that wrote a byte since the last barrier
        self._reader: np.ndarray | None = None  # the same for reads

    def note_write(self, where: Where, program: int, values: np.ndarray) -> None:
        """Bytes `where` are written by `program`, which puts `values` there."""
        if self._programs > 1:
            self._note_shared_write(where, program, values)
        if self.matmul is not None:
            where.of(self.matmul)[...] = 0
        if self.full:
            return
        if where.covers(self.data.nbytes):
            self.full, self._written = True, None
            return
        if self._written is None:
            self._written = np.zeros(self.data.nbytes, np.uint8)
        where.of(self._written)[...] = 1

    def fill_unwritten(self, where: Where) -> None:
        """Give bytes that were never written the value 0xFF: NaN in every float of NKI."""
        if self._written is not None:
            window = where.of(self.data)
            window[where.of(self._written) == 0] = 0xFF

    def written(self, where: Where) -> np.ndarray:
        """Which of the bytes `where` were written, in the form of ``where.of``."""
        if self.full or self._written is None:
            return np.full((*where.shape, where.itemsize), self.full)
        return where.of(self._written) != 0

    def unwritten(self, where: Where) -> int:
        """How many of the bytes `where` were never written."""
        if self.full:
            return 0
        if self._written is None:
            return where.count
        flags = where.of(self._written)
        if flags.all():
            if where.covers(self.data.nbytes):
                self.full, self._written = True, None
            return 0
        return int(flags.size - np.count_nonzero(flags))

    def note_read(self, where: Where, program: int) -> None:
        """Bytes `where` are read by `program`."""
        if self._programs > 1:
            self._note_shared_read(where, program)

    def barrier(self) -> None:
        """All programs have met: what was written before may be read from now on."""
        self._writer = self._reader = None

    def _note_shared_write(self, where: Where, program: int, values: np.ndarray) -> None:
        """What another program wrote or reads may only be written again as it is: equal bytes are no race."""
        me = program + 1
        if self._writer is None:
            self._writer = np.zeros(self.data.nbytes, np.uint8)
        written = where.of(self._writer)
        foreign = (written != 0) & (written != me)
        touched = foreign.copy()
        if self._reader is not None:
            read = where.of(self._reader)
            touched |= (read != 0) & (read != me)
        if touched.any():
            new = np.ascontiguousarray(values).view(np.uint8).reshape(written.shape)
            differs = touched & (new != where.of(self.data))
            if (differs & foreign).any():
                raise Hazard("writes", program, "wrote", written[differs & foreign])
            if differs.any():
                raise Hazard("writes", program, "reads", read[differs])
        written[...] = np.where(foreign, SEVERAL, me)

    def _note_shared_read(self, where: Where, program: int) -> None:
        me = program + 1
        if self._writer is not None:
            written = where.of(self._writer)
            foreign = (written != 0) & (written != me) & (written != SEVERAL)
            if foreign.any():
                raise Hazard("reads", program, "wrote", written[foreign])
        if self._reader is None:
            self._reader = np.zeros(self.data.nbytes, np.uint8)
        tags = where.of(self._reader)
        tags[...] = np.where((tags == 0) | (tags == me), me, SEVERAL)


class Hazard(Exception):
    """Two programs touch the same bytes of shared HBM with no barrier between."""

    def __init__(self, verb: str, program: int, other_verb: str, tags: np.ndarray) -> None:
        who = "another program" if other_verb == "reads" or tags[0] == SEVERAL else f"program {tags[0] - 1}"
        super().__init__(
            f"program {program} {verb} bytes that {who} {other_verb} with no core_barrier in between"
        )


class Where:
    """Which bytes of a memory a tensor view covers: a strided window."""

    def __init__(self, shape: tuple[int, ...], strides: Strides, offset: int, itemsize: int) -> None:
        self.shape, self.strides, self.offset, self.itemsize = shape, strides, offset, itemsize
        self.count = math.prod(shape) * itemsize

    def of(self, data: np.ndarray) -> np.ndarray:
        """The window on `data`, byte by byte."""
        return np.ndarray(
            (*self.shape, self.itemsize),
            np.uint8,
            buffer=data,
            offset=self.offset,
            strides=(*self.strides, 1),
        )

    def covers(self, nbytes: int) -> bool:
        """Whether the window is the whole memory."""
        return self.count == nbytes and 0 not in self.strides


class Storage:
    """One allocation: a :class:`Memory` of its own, or a placed rectangle of an :class:`Arena`."""

    def __init__(self, buffer: str, partitions: int, row: int, memory: Memory, label: str = "") -> None:
        self.buffer, self.partitions, self.row, self.memory, self.label = (
            buffer,
            partitions,
            row,
            memory,
            label,
        )
        self.pitch = row
        self.base = 0
        self.address: tuple[int, int] | None = None
        self._pool: Any = None
        # For the schedule: which HBM tensor this is, or the byte of the partition where it lies on chip.
        self.place = 0 if self.on_chip else next(_serial)

    def counted_in(self, pool: Any) -> Storage:
        """Count this storage in `pool` until it is garbage."""
        self.place = pool.take(id(self), self.row, self.label)
        self._pool = pool
        return self

    def placed_in(self, arena: Arena, address: tuple[int, int]) -> Storage:
        """Put this storage at ``(partition, byte)`` of `arena`."""
        self.memory, self.address, self.pitch = arena.memory, address, arena.pitch
        self.base = address[0] * arena.pitch + address[1]
        self.place = address[1]
        self._arena, self._token = arena, arena.register(self.label)
        return self

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self._pool.give(id(self))

    @property
    def on_chip(self) -> bool:
        return self.buffer in ("sbuf", "psum")

    @property
    def start_partition(self) -> int:
        """Partition it was placed on; 0 where the compiler places it."""
        return self.address[0] if self.address else 0

    def where(self, shape: tuple[int, ...], strides: Strides, offset: int, itemsize: int) -> Where:
        """Byte window of a view given in elements."""
        if not self.on_chip:
            return Where(shape, tuple(s * itemsize for s in strides), offset * itemsize, itemsize)
        partition, byte = divmod(offset * itemsize, self.row)
        steps = [s * itemsize for s in strides]
        steps[0] = steps[0] // self.row * self.pitch
        return Where(shape, tuple(steps), self.base + partition * self.pitch + byte, itemsize)

    def claim(self, where: Where) -> None:
        """This storage wrote `where`: of tensors placed over one another, the bytes are its own now."""
        if self.address is not None:
            self._arena.owner[self._arena.cells(where)] = self._token

    def overwritten(self, where: Where) -> str:
        """Label of a tensor placed over this one that wrote some of `where` last, or nothing."""
        if self.address is None:
            return ""
        owners = self._arena.owner[self._arena.cells(where)]
        foreign = owners[(owners != self._token) & (owners != 0)]
        return self._arena.labels[foreign.flat[0]] if foreign.size else ""


class Arena:
    """All of SBUF or PSUM, for tensors placed by address; knows which of them wrote a byte last.

    Ownership is kept per byte of the row and quadrant of 32 partitions, the grain of start partitions.
    """

    def __init__(self, capacity: int) -> None:
        self.pitch = capacity
        self.memory = Memory(np.empty(128 * capacity, np.uint8), written=False)
        self.owner = np.zeros((4, capacity), np.int32)
        self.labels = ["nothing"]

    def register(self, label: str) -> int:
        """A token for a newly placed tensor."""
        self.labels.append(label)
        return len(self.labels) - 1

    def cells(self, where: Where) -> tuple[slice, slice]:
        """Quadrants and bytes that `where` touches."""
        partition, byte = divmod(where.offset, self.pitch)
        reach = (
            sum((n - 1) * s for n, s in zip(where.shape[1:], where.strides[1:], strict=True)) + where.itemsize
        )
        return slice(partition // 32, (partition + where.shape[0] - 1) // 32 + 1), slice(byte, byte + reach)


def allocate(
    buffer: str, partitions: int, row: int, label: str, address: tuple[int, int] | None = None
) -> Storage:
    """A new storage on the current machine: `partitions` rows of `row` bytes.

    On chip and without `address` it counts as live until it is garbage; PSUM counts whole banks.
    """
    here = _machine.current()
    if buffer not in ("sbuf", "psum"):
        programs = math.prod(here.grid) if buffer == "shared_hbm" else 1
        memory = Memory(np.empty(row, np.uint8), written=False, programs=programs)
        return Storage(buffer, 1, row, memory, label)
    pool = here.sbuf if buffer == "sbuf" else here.psum
    if address is not None:
        return _place(here, pool, buffer, partitions, row, label, address)
    memory = Memory(np.empty(partitions * row, np.uint8), written=False)
    return Storage(buffer, partitions, row, memory, label).counted_in(pool)


def _place(
    here: Any, pool: Any, buffer: str, partitions: int, row: int, label: str, address: tuple[int, int]
) -> Storage:
    start, byte = address
    if start < 0 or start + partitions > hardware.PARTITIONS or byte < 0:
        fail("nki.language.ndarray", "address", "partitions within 0..127 and a byte >= 0", address)
    if buffer == "psum" and byte % hardware.PSUM_BANK_BYTES:
        fail(
            "nki.language.ndarray",
            "address",
            f"the start of a PSUM bank ({hardware.PSUM_BANK_BYTES} B)",
            byte,
        )
    pool.reserve(byte + row)
    arena = here.arenas.get(buffer)
    if arena is None:
        arena = here.arenas[buffer] = Arena(pool.capacity)
    return Storage(buffer, partitions, row, arena.memory, label).placed_in(arena, address)
