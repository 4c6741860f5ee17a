"""``NkiTensor``: a strided view of a storage, with the view methods of NKI 0.6.

Shape, strides and offset are in elements of the view's dtype, as the language guide has them. On chip,
dimension 0 is the partition and stays in front; its stride is the bytes of one partition's row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from . import dtypes
from . import machine as _machine
from .errors import fail
from .hardware import VIEW_DIMS
from .hazards import Region
from .memory import Hazard, Storage, Where


class NKIObject:
    """Base class of the classes a kernel may use; a class without ``__init__`` takes its annotated fields.

    As the language guide has it ("Class Support"): in the order of the annotations, by place or by name, None
    where a field has no default; then ``__post_init__`` is called. NKI's compiler does the same under
    ``@dataclass``, and takes attributes without an annotation for fields too: here they get one, and the
    fields their None.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = inspect.get_annotations(cls)
        for name, value in list(vars(cls).items()):
            plain = value is None or isinstance(value, (bool, int, float, str, tuple, Enum))
            if plain and name not in fields and not name.startswith("__"):
                fields[name] = Any
        for name in fields:
            if name not in vars(cls):
                setattr(cls, name, None)
        cls.__annotations__ = fields

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names: list[str] = []
        for cls in reversed(type(self).__mro__):
            names += [name for name in inspect.get_annotations(cls) if name not in names]
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or set(kwargs) - set(names) or len(given) < len(args) + len(kwargs):
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(names) or 'no arguments'}: got {args}, {kwargs}"
            )
        for name in names:
            setattr(self, name, given[name] if name in given else getattr(self, name, None))
        post_init = getattr(self, "__post_init__", None)
        if post_init is not None:
            post_init()


class DynamicSlice(NKIObject):
    """What ``nl.ds(start, size)`` makes: `size` elements from `start` on."""

    def __init__(self, start: Any, size: int) -> None:
        self.start, self.size = start, size


class VirtualRegister(NKIObject):
    """A scalar in an engine's register: known at run time, so no value for Python's control flow."""

    def __init__(self, value: int | None, frozen: bool = False) -> None:
        self.value, self.frozen = value, frozen

    def read(self) -> int:
        """The value on the device. Error when nothing was ever moved in."""
        if self.value is None:
            fail("register", "value", "a register that was written", "one allocated without a value")
        return self.value

    def __bool__(self) -> bool:
        return self.read() != 0

    def __int__(self) -> int:
        raise TypeError("a VirtualRegister has no value while the kernel is traced: no int(), range() or if")

    __index__ = __int__


class Indirect:
    """How an indirect view finds its data: `dim` of the base is indexed by `index`."""

    def __init__(self, index: Any, stride: int, extent: int, vector: bool) -> None:
        self.index, self.stride, self.extent, self.vector = index, stride, extent, vector


def _static(value: Any) -> int:
    return value.read() if isinstance(value, VirtualRegister) else int(value)


class NkiTensor(NKIObject):
    """A tensor in SBUF, PSUM or HBM. Views share the storage; none copies."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: str,
        storage: Storage,
        buffer: str = "sbuf",
        name: str = "",
        *,
        strides: Sequence[int] | None = None,
        offset: int = 0,
        indirect: Indirect | None = None,
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.buffer = buffer
        self.name = name
        self.storage = storage
        self.offset = offset
        self.strides = tuple(strides) if strides is not None else _row_major(self.shape)
        self._indirect = indirect
        self._where: Where | None = None

    # -- attributes -------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def on_chip(self) -> bool:
        return self.storage.on_chip

    @property
    def itemsize(self) -> int:
        return dtypes.itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        return math.prod(self.shape[1:])

    @property
    def start_partition(self) -> int:
        """Partition the view starts on."""
        return self.storage.start_partition + self.offset * self.itemsize // self.storage.row

    @property
    def address(self) -> tuple[int, int] | None:
        """``(partition, byte)`` of a tensor placed by address."""
        return self.storage.address

    def __repr__(self) -> str:
        label = f"{self.name!r} " if self.name else ""
        return f"<{label}{self.buffer} {self.dtype}{list(self.shape)}>"

    def __bool__(self) -> bool:
        """True: there is a tensor. What it holds is not known while the kernel is traced."""
        got = "`if tensor`, which is always true"
        _machine.current().caution("a kernel", repr(self), "`tensor != None`", got)
        return True

    def is_contiguous(self) -> bool:
        """Whether elements are dense and row-major (per partition, on chip)."""
        first = 1 if self.on_chip else 0
        expected = _row_major(self.shape)
        return all(
            n == 1 or s == e for n, s, e in list(zip(self.shape, self.strides, expected, strict=True))[first:]
        )

    def is_indirect(self) -> bool:
        """Whether the address is known at run time only."""
        return self._indirect is not None

    def get_pattern(self) -> list[list[int]]:
        """``[[stride, count], ...]``, as ``ap`` takes it."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    # -- views ------------------------------------------------------------------------------------

    def _view(self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> NkiTensor:
        if len(shape) > VIEW_DIMS:
            fail("NkiTensor view", "shape", f"at most {VIEW_DIMS} dimensions", tuple(shape))
        return NkiTensor(
            shape,
            self.dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=strides,
            offset=self.offset if offset is None else offset,
            indirect=self._indirect,
        )

    def __getitem__(self, key: Any) -> NkiTensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) != self.ndim:
            fail("indexing", "key", f"at most {self.ndim} indices for {self!r}", key)
        shape, strides, offset, dropped = [], [], self.offset, []
        for dim, (k, extent, stride) in enumerate(zip(keys, self.shape, self.strides, strict=True)):
            start, size, step, keep = self._range(k, extent, dim)
            self._direct(dim, whole=(start, size, step) == (0, extent, 1))
            offset += start * stride
            if keep or (self.on_chip and dim == 0):
                shape.append(size)
                strides.append(stride * step)
            else:
                dropped.append(stride)
        least = 2 if self.on_chip else 1
        if len(shape) < least and dropped:
            shape.append(1)
            strides.append(dropped[-1] if not self.on_chip else 1)
        return self._view(shape, strides, offset)

    def _range(self, key: Any, extent: int, dim: int) -> tuple[int, int, int, bool]:
        """(start, size, step, is a slice) of one index; bounds are checked, never clipped silently."""
        if isinstance(key, NkiTensor):
            fail("indexing", f"dimension {dim}", "an integer, slice or nl.ds; select() takes a tensor", key)
        if isinstance(key, DynamicSlice):
            start, size = _static(key.start), int(key.size)
            if not 0 <= start <= start + size <= extent or size < 1:
                fail("indexing", f"dimension {dim}", f"ds within 0..{extent}", f"ds({start}, {size})")
            return start, size, 1, True
        if isinstance(key, slice):
            step = 1 if key.step is None else int(key.step)
            start = 0 if key.start is None else _static(key.start)
            stop = extent if key.stop is None else _static(key.stop)
            start, stop = (start + extent if start < 0 else start), (stop + extent if stop < 0 else stop)
            if step < 1 or not 0 <= start < stop <= extent:
                fail("indexing", f"dimension {dim}", f"a non-empty slice within 0..{extent}", key)
            return start, -(-(stop - start) // step), step, True
        index = _static(key)
        if not -extent <= index < extent:
            fail("indexing", f"dimension {dim}", f"an index within 0..{extent - 1}", index)
        return index % extent, 1, 1, False

    def _direct(self, dim: int, whole: bool = False) -> None:
        if self._indirect is not None and self._indirect.vector and dim == 0 and not whole:
            fail("indexing", f"dimension {dim}", "a dimension that is not addressed indirectly", repr(self))

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """``t[..., start:end:step, ...]`` on `dim`."""
        keys: list[Any] = [slice(None)] * self.ndim
        keys[dim] = slice(start, end, step)
        return self[tuple(keys)]

    def select(self, dim: int, index: Any) -> NkiTensor:
        """One index of `dim`, which goes away; a ``[1, 1]`` tensor or register makes it a run-time index."""
        if not isinstance(index, (NkiTensor, VirtualRegister)):
            keys: list[Any] = [slice(None)] * self.ndim
            keys[dim] = index
            return self[tuple(keys)]
        if self._indirect is not None or (self.on_chip and dim == 0):
            fail("select", "dim", "one dynamic index, and not of the partition", dim)
        result = self._view(_without(self.shape, dim), _without(self.strides, dim))
        result._indirect = Indirect(index, self.strides[dim], self.shape[dim], vector=False)
        return result

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Row ``vector_offset[p]`` of dimension 0 for each partition p. HBM only."""
        if dim != 0 or self.on_chip or self._indirect is not None:
            fail("vector_select", "tensor", "dim 0 of a direct HBM tensor", f"dim {dim} of {self!r}")
        result = self._view((vector_offset.shape[0], *self.shape[1:]), self.strides)
        result._indirect = Indirect(vector_offset, self.strides[0], self.shape[0], vector=True)
        return result

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        """Dimensions in the order `dims`; on chip the partition stays first."""
        if sorted(dims) != list(range(self.ndim)):
            fail("permute", "dims", f"a permutation of 0..{self.ndim - 1}", dims)
        self._partition_stays("permute", "dims[0]", dims[0] == 0, dims)
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a dimension of size 1."""
        if self.shape[dim] != 1:
            fail("broadcast", f"shape[{dim}]", "1", self.shape[dim])
        self._partition_stays("broadcast", "dim", dim % self.ndim != 0, dim)
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(shape, strides)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a dimension of size 1."""
        self._partition_stays("expand_dim", "dim", dim != 0, dim)
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, strides[dim] * self.shape[dim] if dim < self.ndim else 1)
        return self._view(shape, strides)

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a dimension of size 1."""
        if self.shape[dim] != 1:
            fail("squeeze_dim", f"shape[{dim}]", "1", self.shape[dim])
        self._partition_stays("squeeze_dim", "dim", dim % self.ndim != 0, dim)
        return self._view(_without(self.shape, dim), _without(self.strides, dim))

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        """Split a dimension; one size may be -1."""
        parts = list(shape)
        if -1 in parts:
            parts[parts.index(-1)] = self.shape[dim] // -math.prod(parts)
        if math.prod(parts) != self.shape[dim]:
            fail("reshape_dim", "shape", f"sizes whose product is {self.shape[dim]}", tuple(shape))
        self._partition_stays("reshape_dim", "dim", dim != 0 or len(parts) == 1, dim)
        inner = [s * self.strides[dim] for s in _row_major(tuple(parts))]
        return self._view(
            (*self.shape[:dim], *parts, *self.shape[dim + 1 :]),
            (*self.strides[:dim], *inner, *self.strides[dim + 1 :]),
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge dimensions that are contiguous with one another."""
        self._partition_stays("flatten_dims", "start_dim", start_dim > 0, start_dim)
        merged = (*self.shape[:start_dim], math.prod(self.shape[start_dim : end_dim + 1]))
        return self._reshaped("flatten_dims", (*merged, *self.shape[end_dim + 1 :]))

    def reshape(self, shape: Sequence[int]) -> NkiTensor:
        """The same elements in another shape; the layout must allow it without a copy."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if math.prod(shape) != self.size:
            fail("reshape", "shape", f"{self.size} elements", shape)
        self._partition_stays("reshape", "shape[0]", not shape or shape[0] == self.shape[0], shape)
        return self._reshaped("reshape", shape)

    def _reshaped(self, what: str, shape: tuple[int, ...]) -> NkiTensor:
        probe = np.lib.stride_tricks.as_strided(np.empty(1, np.uint8), self.shape, self.strides)
        try:
            probe.shape = shape
        except AttributeError:
            fail(what, "layout", f"one that can be seen as {shape} without a copy", self.get_pattern())
        return self._view(shape, probe.strides)

    def rearrange(
        self, src_pattern: tuple, dst_pattern: tuple, fixed_sizes: dict[str, int] | None = None
    ) -> NkiTensor:
        """Split, reorder and merge dimensions by name, as einops does."""
        sizes = dict(fixed_sizes or {})
        result, names = self, list[str]()
        for group in src_pattern:
            parts = (group,) if isinstance(group, str) else tuple(group)
            if len(parts) > 1:
                result = result.reshape_dim(len(names), [sizes.get(p, -1) for p in parts])
            names.extend(parts)
        flat = [n for group in dst_pattern for n in ((group,) if isinstance(group, str) else group)]
        if sorted(flat) != sorted(names):
            fail("rearrange", "dst_pattern", f"the names {names}", dst_pattern)
        result = result.permute([names.index(n) for n in flat])
        for dim, group in enumerate(dst_pattern):
            if not isinstance(group, str) and len(group) > 1:
                merged = math.prod(result.shape[dim : dim + len(group)])
                shape = (*result.shape[:dim], merged, *result.shape[dim + len(group) :])
                result._partition_stays("rearrange", "dst_pattern", dim != 0, dst_pattern)
                result = result._reshaped("rearrange", shape)
        return result

    def view(self, dtype: Any) -> NkiTensor:
        """The same bytes as another dtype; the last dimension grows or shrinks."""
        dtype = dtypes.name_of(dtype)
        old, new = self.itemsize, dtypes.itemsize(dtype)
        if self.is_indirect() or (self.strides[-1] != 1 and self.shape[-1] != 1 and old != new):
            fail("view", "tensor", "a direct view, contiguous in its last dimension", self.get_pattern())
        counts = [self.shape[-1] * old, self.offset * old, *(s * old for s in self.strides[:-1])]
        if any(c % new for c in counts):
            fail("view", "last dimension", f"bytes and strides divisible by {new} ({dtype})", repr(self))
        last = 1 if old != new else self.strides[-1]
        return NkiTensor(
            (*self.shape[:-1], counts[0] // new),
            dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=(*(c // new for c in counts[2:]), last),
            offset=counts[1] // new,
        )

    reinterpret_cast = view

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """An access pattern of ``[stride, count]`` pairs on the storage itself, whatever this view is."""
        name = self.dtype if dtype is None else dtypes.name_of(dtype)
        size = dtypes.itemsize(name)
        start = self.offset * self.itemsize // size if offset is None else offset
        strides, shape = [int(s) for s, _ in pattern], [int(n) for _, n in pattern]
        if len(shape) > VIEW_DIMS or min(shape, default=0) < 1 or min(strides) < 0:
            fail("ap", "pattern", f"1 to {VIEW_DIMS} pairs [stride >= 0, count >= 1]", pattern)
        if scalar_offset is not None and vector_offset is not None:
            fail("ap", "scalar_offset, vector_offset", "at most one of them", "both")
        row = self.storage.row // size
        if self.on_chip and strides[0] != row and shape[0] > 1:
            fail(
                "ap", "pattern[0]", f"the partition stride {row}: whole rows one after the other", pattern[0]
            )
        result = NkiTensor(
            shape, name, self.storage, self.buffer, self.name, strides=strides, offset=start,
        )  # fmt: skip
        indirect = scalar_offset if scalar_offset is not None else vector_offset
        if indirect is not None:
            step = self.strides[indirect_dim] * self.itemsize // size
            extent = self.shape[indirect_dim]
            result._indirect = Indirect(indirect, step, extent, vector_offset is not None)
        else:
            result._inside("ap")
        return result

    def indirect(self, index: NkiTensor, num_elem: int | None = None) -> NkiTensor:
        raise NotImplementedError("NkiTensor.indirect: tensor indirection exists from NeuronCore-v4 on only")

    def __setitem__(self, key: Any, value: Any) -> None:
        fail(
            "assignment",
            "tensor[...] = value",
            "an instruction that writes, such as nki.isa.tensor_copy",
            key,
        )

    def _partition_stays(self, what: str, operand: str, ok: bool, got: Any) -> None:
        vector = self._indirect is not None and self._indirect.vector
        if (self.on_chip or vector) and not ok:
            fail(what, operand, "the partition dimension left where it is", got)

    def _inside(self, what: str) -> None:
        """Error unless every element lies in the storage."""
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        if not self.on_chip:
            last, limit = self.offset + sum(reach), self.storage.row // self.itemsize
        else:
            row = self.storage.row // self.itemsize
            partition, first = divmod(self.offset, row)
            if partition + self.shape[0] > self.storage.partitions:
                fail(what, "pattern", f"{self.storage.partitions} partitions at most", self.get_pattern())
            last, limit = first + sum(reach[1:]), row
        if self.offset < 0 or last >= limit:
            fail(what, "pattern", f"elements below {limit}", f"element {last} ({self.get_pattern()})")

    # -- contents (for instructions) --------------------------------------------------------------

    def where(self) -> Where:
        """The bytes of a direct view."""
        if self._where is None:
            self._where = self.storage.where(self.shape, self.strides, self.offset, self.itemsize)
        return self._where

    def array(self) -> np.ndarray:
        """The elements of a direct view, as a NumPy view: no checks, no record."""
        where = self.where()
        return np.ndarray(
            self.shape,
            dtypes.NUMPY[self.dtype],
            buffer=self.storage.memory.data,
            offset=where.offset,
            strides=where.strides,
        )

    def read(self, instruction: str, operand: str) -> np.ndarray:
        """The elements, once they are known to have been written (and by no other program meanwhile)."""
        where, memory = self.where(), self.storage.memory
        missing, here = memory.unwritten(where), _machine.current()
        if missing:
            got = f"{missing} unwritten bytes of {self!r}"
            if missing == where.count or not self.on_chip:
                fail(instruction, operand, "memory that was written", got)
            here.caution(instruction, operand, "memory that was written", got)
            memory.fill_unwritten(where)
        other = self.storage.overwritten(where)
        if other:
            fail(
                instruction,
                operand,
                f"{self!r} as it was written",
                f"bytes that {other}, placed over it, wrote",
            )
        try:
            memory.note_read(where, here.program)
        except Hazard as hazard:
            fail(instruction, operand, "no race on shared HBM", hazard)
        if here.cost is not None:
            here.cost.reads.append(Region(self))
        return self.array()

    def write(self, instruction: str, operand: str, values: np.ndarray) -> None:
        """Put `values`, already of this dtype (or one of it for all), into the elements."""
        where, memory, here = self.where(), self.storage.memory, _machine.current()
        if any(s == 0 and n > 1 for s, n in zip(self.strides, self.shape, strict=True)):
            expected, got = "a destination without a broadcast dimension", self.get_pattern()
            if not self.on_chip:
                fail(instruction, operand, expected, got)
            here.caution(instruction, operand, expected, got)  # AWS's kernels throw results away like that
        target = self.array()
        new = np.broadcast_to(values.reshape(target.shape) if values.ndim else values, target.shape)
        try:
            memory.note_write(where, here.program, new)
        except Hazard as hazard:
            fail(instruction, operand, "no race on shared HBM", hazard)
        if here.cost is not None:
            here.cost.writes.append(Region(self))
        self.storage.claim(where)
        target[...] = new


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _without(sizes: tuple[int, ...], dim: int) -> tuple[int, ...]:
    dim %= len(sizes)
    return (*sizes[:dim], *sizes[dim + 1 :])
