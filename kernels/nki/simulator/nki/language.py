"""The simulator's ``nki.language``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import numpy as np

from .. import dtypes, hardware, ops
from .. import machine as _machine
from ..errors import NotCovered, check, fail
from ..memory import Memory, Storage, allocate
from ..tensor import DynamicSlice, NKIObject, NkiTensor, VirtualRegister

bool_ = "bool"
int8, int16, int32 = "int8", "int16", "int32"
uint8, uint16, uint32 = "uint8", "uint16", "uint32"
float16, float32, bfloat16, tfloat32 = "float16", "float32", "bfloat16", "tfloat32"
float8_e4m3, float8_e4m3fn, float8_e5m2 = "float8_e4m3", "float8_e4m3fn", "float8_e5m2"
float8_e8m0fnu = "float8_e8m0fnu"
float8_e5m2_x4, float8_e4m3fn_x4 = "float8_e5m2_x4", "float8_e4m3fn_x4"
float4_e2m1fn_x4 = "float4_e2m1fn_x4"


class MemoryRegion(StrEnum):
    """Where a tensor lives. Compares equal to its name."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"


sbuf, psum = MemoryRegion.sbuf, MemoryRegion.psum
private_hbm, shared_hbm = MemoryRegion.private_hbm, MemoryRegion.shared_hbm
hbm = private_hbm


class _TileSize(NKIObject):
    """Sizes of the hardware, as ``nl.tile_size``."""

    pmax = hardware.PARTITIONS
    psum_fmax = psum_bank_fmax = hardware.PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = hardware.PSUM_BANK_BYTES
    psum_num_banks = hardware.PSUM_BANKS
    gemm_stationary_fmax = hardware.MATMUL_STATIONARY_FREE
    gemm_moving_fmax = hardware.MATMUL_MOVING_FREE

    @property
    def sbuf_fmax_bytes(self) -> int:
        """SBUF bytes per partition."""
        return _machine.target().sbuf_bytes

    total_available_sbuf_size = sbuf_fmax_bytes

    @property
    def sbuf_fmax(self) -> int:
        """The same in fp32 elements."""
        return self.sbuf_fmax_bytes // 4

    @property
    def sbuf_size_bytes(self) -> int:
        """Bytes of all partitions."""
        return self.sbuf_fmax_bytes * hardware.PARTITIONS


tile_size = _TileSize()


def is_hbm(buffer: Any) -> bool:
    """Whether `buffer` is in HBM."""
    return buffer in (private_hbm, shared_hbm)


def is_on_chip(buffer: Any) -> bool:
    """Whether `buffer` is SBUF or PSUM."""
    return buffer in (sbuf, psum)


def is_psum(buffer: Any) -> bool:
    """Whether `buffer` is PSUM."""
    return buffer == psum


def is_sbuf(buffer: Any) -> bool:
    """Whether `buffer` is SBUF."""
    return buffer == sbuf


def ndarray(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "", address: Any = None) -> NkiTensor:
    """Allocate a tensor; its elements are not initialized.

    ``address=(partition, byte)`` places an SBUF or PSUM tensor itself; tensors placed over one another share
    their bytes. Without it the tensor counts until nothing refers to it any more.
    """
    what = "nki.language.ndarray"
    shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    dtype, region = dtypes.name_of(dtype), MemoryRegion(buffer).value
    check(len(shape) >= 1 and min(shape) >= 1, what, "shape", "positive sizes", shape)
    label = f"{name + ' ' if name else ''}{dtype}{list(shape)}"
    if region in ("sbuf", "psum"):
        check(len(shape) >= 2, what, "shape", "a partition and a free dimension", shape)
        check(shape[0] <= hardware.PARTITIONS, what, "shape[0]", f"at most {hardware.PARTITIONS}", shape[0])
        row = math.prod(shape[1:]) * dtypes.itemsize(dtype)
        storage = allocate(region, shape[0], row, label, address)
    else:
        check(address is None, what, "address", "None for a tensor in HBM", address)
        size = math.prod(shape) * dtypes.itemsize(dtype)
        if region == "shared_hbm":
            key = (label, "shared_hbm")
            storage = _machine.current().shared.allocation(key, lambda: allocate(region, 1, size, label))
        else:
            storage = allocate(region, 1, size, label)
    return NkiTensor(shape, dtype, storage, MemoryRegion(region), name)


def ds(start: Any, size: int) -> DynamicSlice:
    """`size` elements from `start` on, as an index."""
    return DynamicSlice(start, size)


def _bounds(start: Any, stop: Any, step: Any) -> range:
    for value in (start, stop, step):
        if isinstance(value, VirtualRegister):
            fail("range", "bounds", "integers; nl.dynamic_range takes registers", value)
    return range(start) if stop is None else range(start, stop, step)


def affine_range(start: int, stop: int | None = None, step: int = 1) -> Iterator[int]:
    """A loop unrolled by the compiler."""
    return iter(_bounds(start, stop, step))


sequential_range = static_range = affine_range


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """A loop on the device: bounds may be registers, the counter is one."""
    check(isinstance(step, int) and step > 0, "nki.language.dynamic_range", "step", "a positive int", step)
    low, high = (0, start) if stop is None else (start, stop)
    low, high = (v.read() if isinstance(v, VirtualRegister) else v for v in (low, high))
    for value in range(low, high, step):
        yield VirtualRegister(value, frozen=True)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[VirtualRegister], None], step: int = 1) -> None:
    """``body_fun(i)`` for each i, on the device."""
    for i in dynamic_range(lower, upper, step):
        body_fun(i)


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """``r = body_fun(r)`` while r is not zero, on the device."""
    register = init
    while register.read() != 0:
        register = body_fun(VirtualRegister(register.read()))


def program_id(axis: int = 0) -> int:
    """Which program of the launch grid this is."""
    check(axis == 0, "nki.language.program_id", "axis", "0 (grids have one dimension)", axis)
    return _machine.current().program


def num_programs(axes: Any = 0) -> int:
    """How many programs the launch grid has."""
    return math.prod(_machine.current().grid)


def program_ndim() -> int:
    """Dimensions of the launch grid; 0 without one."""
    return len(_machine.current().grid)


def _filled(shape: Any, value: Any, dtype: Any, buffer: Any, name: str) -> NkiTensor:
    from . import isa

    result = ndarray(shape, dtype, buffer, name)
    if result.on_chip:
        isa.memset(result, value)
    else:
        result.write("nki.language.full", "result", np.asarray(value).astype(dtypes.NUMPY[result.dtype]))
    return result


def zeros(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """A tensor of zeros."""
    return _filled(shape, 0, dtype, buffer, name)


def ones(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """A tensor of ones."""
    return _filled(shape, 1, dtype, buffer, name)


def full(shape: Any, fill_value: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """A tensor of one value."""
    return _filled(shape, fill_value, dtype, buffer, name)


def empty_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """A tensor of the shape of `x`, not initialized."""
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """Zeros of the shape of `x`."""
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the values of `src` in HBM."""
    from . import isa

    result = ndarray(src.shape, dtype or src.dtype)
    isa.dma_copy(dst=result, src=src)
    return result


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Put the SBUF tile `value` into `dst` in HBM."""
    from . import isa

    isa.dma_copy(dst=dst, src=value)


def shared_constant(constant: Any) -> NkiTensor:
    """A shared HBM tensor that comes with the compiled kernel."""
    array = np.ascontiguousarray(np.load(constant) if isinstance(constant, str) else constant)
    flat = array.reshape(-1).view(np.uint8)
    storage = Storage("shared_hbm", 1, flat.nbytes, Memory(flat, written=True))
    return NkiTensor(array.shape, dtypes.name_of(array.dtype), storage, shared_hbm)


def shared_identity_matrix(n: int, dtype: Any = uint8, dst: NkiTensor | None = None) -> NkiTensor:
    """An ``[n, n]`` identity matrix in SBUF, loaded from a constant."""
    from . import isa

    name = dtypes.name_of(dtype)
    result = ndarray((n, n), name) if dst is None else dst
    isa.dma_copy(dst=result, src=shared_constant(np.eye(n, dtype=np.float32).astype(dtypes.NUMPY[name])))
    return result


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Print a tensor's values."""
    print(print_prefix, tensor.read("nki.language.device_print", "tensor"))


def broadcast_to(x: NkiTensor, shape: Any, dtype: Any = None) -> NkiTensor:
    """A tile of `shape` with the values of `x` repeated along dimensions of size 1.

    Along the partitions by matmuls against ones; free dimensions are a stride of 0.
    """
    from . import isa

    if x.shape == tuple(shape) and dtype in (None, x.dtype):
        return x
    view = x
    if x.shape[0] != shape[0]:
        wide = ndarray((shape[0], x.free_size), x.dtype)
        against = ones((1, shape[0]), float32 if x.dtype == float32 else bfloat16)
        row, step = x.reshape((1, x.free_size)), tile_size.gemm_moving_fmax
        for start in range(0, x.free_size, step):
            part = row[:, start : min(start + step, x.free_size)]
            product = ndarray((shape[0], part.free_size), float32, psum)
            isa.nc_matmul(product, against, part)
            isa.tensor_copy(wide[:, start : start + part.free_size], product)
        view = wide.reshape((shape[0], *x.shape[1:]))
    for dim in range(1, x.ndim):
        view = view if view.shape[dim] == shape[dim] else view.broadcast(dim, shape[dim])
    result = ndarray(shape, dtype or x.dtype)
    isa.tensor_copy(result, view)
    return result


@contextmanager
def no_reorder() -> Iterator[None]:
    """Instructions inside keep their order: always so here."""
    yield


def _binary(op: ops.Operator, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile ``x <op> y`` of tiles and constants; a ``[P, 1]`` tile is repeated along the row."""
    from . import isa

    if not isinstance(x, NkiTensor) and not isinstance(y, NkiTensor):
        fail(repr(op), "x, y", "at least one tile", (x, y))
    model = x if isinstance(x, NkiTensor) else y
    if isinstance(x, NkiTensor) and isinstance(y, NkiTensor):
        shape = tuple(np.broadcast_shapes(x.shape, y.shape))
        left, right = (t if t.shape == shape else broadcast_to(t, shape) for t in (x, y))
        result = ndarray(shape, dtype or model.dtype)
        isa.tensor_tensor(result, left, right, op)
        return result
    result = ndarray(model.shape, dtype or model.dtype)
    constant = y if model is x else x
    isa.tensor_scalar(result, model, op, constant, reverse0=model is y)
    return result


def _unary(op: ops.Operator, x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile ``op(x)`` by ScalarE."""
    from . import isa

    result = ndarray(x.shape, dtype or x.dtype)
    isa.activation(result, op, x)
    return result


def _copy(op: ops.Operator, x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the values of `x`, by VectorE."""
    from . import isa

    result = ndarray(x.shape, dtype or x.dtype)
    isa.tensor_copy(result, x, engine=isa.engine.vector)
    return result


def _reduction(name: str) -> Callable[..., NkiTensor]:
    def call(
        op: ops.Operator, x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False
    ) -> NkiTensor:
        from . import isa

        axes = [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
        kept = [1 if i in axes else n for i, n in enumerate(x.shape)]
        result = ndarray(kept, dtype or x.dtype)
        isa.tensor_reduce(result, _OPERATORS[name], x, axis)
        dropped = [n for i, n in enumerate(x.shape) if i not in axes]
        return result if keepdims or len(dropped) < 2 else result.reshape(dropped)

    return call


_CALLS: dict[str, Callable[..., NkiTensor]] = {
    **dict.fromkeys(ops.ACTIVATION, _unary),
    **dict.fromkeys((*ops.ARITHMETIC, *(name for name in ops.BITVEC if name != "invert")), _binary),
    "copy": _copy,
    "max": _reduction("maximum"),
    "min": _reduction("minimum"),
    "sum": _reduction("add"),
}
_NAMES = {*ops.BITVEC, *ops.ARITHMETIC, *ops.UNARY, *ops.ACTIVATION, *_CALLS}
# Reached by __getattr__, so that abs, max, min and sum stay Python's own in this module.
_OPERATORS = {name: ops.Operator(name, _CALLS.get(name)) for name in _NAMES}


def __getattr__(name: str) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotCovered(f"nki.language.{name}")
