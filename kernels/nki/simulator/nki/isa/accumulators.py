"""The accumulator registers of VectorE and ScalarE, one value per partition."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import hardware, ops
from ... import machine as _machine
from ...operands import check, scalar
from . import types


def accumulate(by: str, values: np.ndarray, cmd: Any, initial: Any = None) -> np.ndarray:
    """Reduce `values` into the engine's accumulator registers, as `cmd` says; returns their content."""
    registers, on = _machine.current().registers, _machine.current().instruction.engine
    partitions = values.shape[0]
    check((initial is not None) == (cmd == types.reduce_cmd.load_reduce), "reduce_init",
          "a value with reduce_cmd.load_reduce, and only then", f"{initial} with {cmd}")  # fmt: skip
    if cmd in (types.reduce_cmd.reset_reduce, types.reduce_cmd.reset):
        start: Any = np.full(hardware.PARTITIONS, ops.IDENTITY[by], np.float32)
    elif cmd == types.reduce_cmd.load_reduce:
        start = np.zeros(hardware.PARTITIONS, np.float32)
        start[:partitions] = np.broadcast_to(scalar("reduce_init", initial, partitions), (partitions, 1))[
            :, 0
        ]
    else:
        start = registers.get(on)
        check(start is not None, "reduce_cmd", "a reset before the first reduce", cmd)
        start = start.copy()
    if cmd in (types.reduce_cmd.reduce, types.reduce_cmd.reset_reduce, types.reduce_cmd.load_reduce):
        with np.errstate(all="ignore"):
            start[:partitions] = ops.ARITHMETIC[by](start[:partitions], ops.reduce(by, values))
    registers[on] = start
    return start[:partitions].copy()
