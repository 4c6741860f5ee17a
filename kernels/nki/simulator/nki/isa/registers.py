"""Scalars in an engine's registers: values known when the kernel runs, not while it is traced."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...operands import DMA_MEMORY, check, put_bits, read, tensor
from ...tensor import NkiTensor, VirtualRegister
from .instruction import instruction


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A register, holding `x` if given."""
    return VirtualRegister(x)


@instruction(engine="sync")
def register_move(dst: VirtualRegister, src: Any) -> None:
    """Put a constant or another register's value into `dst`."""
    _writable(dst).value = src.read() if isinstance(src, VirtualRegister) else int(src)


@instruction(engine="sync")
def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    """Load the single element of `src` into `dst`."""
    src = tensor("src", src, DMA_MEMORY)
    check(src.size == 1, "src", "one element", src)
    _writable(dst).value = int(read("src", src).reshape(-1)[0])


@instruction(engine="sync")
def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    """Store a register in the single element of `dst`."""
    dst = tensor("dst", dst, DMA_MEMORY)
    check(dst.size == 1, "dst", "one element", dst)
    put_bits(dst, np.array(src.read()))


def _writable(register: Any) -> VirtualRegister:
    ok = isinstance(register, VirtualRegister) and not register.frozen
    check(ok, "dst", "a register that is no loop counter", register)
    return register
