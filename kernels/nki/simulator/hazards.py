"""Which instruction must wait for which: by the bytes they touch, and where the compiler puts tensors."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .tensor import NkiTensor


class Region:
    """The bytes of one memory that a view covers.

    space: SBUF, PSUM or one HBM tensor. On chip the bytes are a row's, on partitions `first` to `last`
    (not included); in HBM there is one row. Within it: runs of `run` bytes, as `dims`, pairs of a step in
    bytes and a count, repeat them from byte `low` on; `high` is the end of the last.
    """

    __slots__ = ("_starts", "dims", "first", "high", "last", "low", "run", "space")

    def __init__(self, t: NkiTensor) -> None:
        storage, size = t.storage, t.itemsize
        sizes = [(s * size, n) for n, s in zip(t.shape, t.strides, strict=True)]
        self.first, self.last = 0, 1
        if storage.on_chip:
            step, count = sizes.pop(0)
            partition, byte = divmod(t.offset * size, storage.row)
            self.first = storage.start_partition + partition
            self.last = self.first + (count - 1) * (step // storage.row) + 1
            self.low = byte + storage.place
            self.space: object = storage.buffer if storage.address is None else f"{storage.buffer} placed"
        else:
            self.low = t.offset * size
            self.space = storage.place
        run, dims = size, list[tuple[int, int]]()
        for step, count in sorted(pair for pair in sizes if pair[0] > 0 and pair[1] > 1):
            if not dims and step <= run:  # contiguous, or windows that overlap
                run += step * (count - 1)
            elif dims and step == dims[-1][0] * dims[-1][1]:
                dims[-1] = (dims[-1][0], dims[-1][1] * count)
            else:
                dims.append((step, count))
        self.run, self.dims = run, tuple(dims)
        self.high = self.low + sum(step * (count - 1) for step, count in dims) + run
        self._starts: np.ndarray | None = None

    def starts(self) -> np.ndarray:
        """Where the runs begin, in rising order."""
        if self._starts is None:
            starts = np.array([self.low])
            for step, count in self.dims:
                starts = (starts[:, None] + np.arange(count) * step).reshape(-1)
            self._starts = np.sort(starts)
        return self._starts

    def overlaps(self, other: Region) -> bool:
        """Whether both cover a byte (of the same space)."""
        if self.low >= other.high or other.low >= self.high:
            return False
        if self.last <= other.first or other.last <= self.first:
            return False
        if not self.dims and not other.dims:
            return True
        mine, theirs = self.starts(), other.starts()
        # The last run of ours that begins before the end of theirs is the one that can reach into it.
        before = np.searchsorted(mine, theirs + other.run, "left") - 1
        return bool(((before >= 0) & (mine[before] + self.run > theirs)).any())

    def covers(self, other: Region) -> bool:
        """Whether all bytes of `other` (of the same space) are this one's, as far as is told cheaply."""
        if not (self.first <= other.first and other.last <= self.last):
            return False
        if not self.dims:
            return self.low <= other.low and other.high <= self.high
        return (self.low, self.run, self.dims) == (other.low, other.run, other.dims)


READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE = "RAW", "WAR", "WAW"


class Hazards:
    """Who wrote and read which bytes; what a new instruction therefore depends on."""

    def __init__(self) -> None:
        self._writers: dict[object, list[tuple[Region, int]]] = defaultdict(list)
        self._readers: dict[object, list[tuple[Region, int]]] = defaultdict(list)

    def note(self, index: int, reads: Iterable[Region], writes: Iterable[Region]) -> dict[int, str]:
        """Enter instruction `index`: the instructions it depends on, and why."""
        found: dict[int, str] = {}
        for region in reads:
            for seen, by in self._writers[region.space]:
                if seen.overlaps(region):
                    found[by] = READ_AFTER_WRITE
        for region in writes:
            for seen, by in self._readers[region.space]:
                if by not in found and seen.overlaps(region):
                    found[by] = WRITE_AFTER_READ
            for seen, by in self._writers[region.space]:
                if by not in found and seen.overlaps(region):
                    found[by] = WRITE_AFTER_WRITE
        # What a later access of these bytes waits for need not be looked at again: whoever waits for the
        # new entry waits for the old one.
        for region in writes:
            for table in (self._writers, self._readers):
                table[region.space] = [e for e in table[region.space] if not region.covers(e[0])]
            self._writers[region.space].append((region, index))
        for region in reads:
            self._readers[region.space].append((region, index))
        found.pop(index, None)
        return found


class Places:
    """Next-fit addresses for the tensors the compiler places: tensors at the same address exclude each other.

    A tensor that fits in no gap gets an address beyond the end, which nothing else has.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []
        self._next = 0
        self._beyond = 1 << 40

    def take(self, nbytes: int, capacity: int) -> int:
        """The first byte of `nbytes` within `capacity` that are free, from the last tensor's end on."""
        for start in (self._next, 0):
            at = start
            for low, high in self._taken:
                if low >= at + nbytes:
                    break
                at = max(at, high)
            if at + nbytes <= capacity:
                break
        else:
            at = self._beyond
            self._beyond += nbytes
        self._taken.insert(bisect(self._taken, (at, at + nbytes)), (at, at + nbytes))
        if at < capacity:
            self._next = at + nbytes
        return at

    def give(self, at: int) -> None:
        """The tensor at `at` is gone."""
        self._taken = [pair for pair in self._taken if pair[0] != at]
