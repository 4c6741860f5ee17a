"""The accumulator registers of VectorE and ScalarE, one value per partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import hardware, ops
from ... import machine as _machine
from ...errors import kernel_line
from ...operands import check, fail, scalar
from .constants import reduce_cmd as commands


@dataclass
class Accumulator:
    """An engine's registers: their values, the operator that made them, and whether they were read out.

    lost: the line of a chain that was reset before anything read it out. unsure: an instruction ran that may
    have changed the registers.
    """

    values: np.ndarray
    operator: str
    line: str
    read_out: bool = False
    lost: str = ""
    unsure: bool = False


def accumulate(by: str, values: np.ndarray, cmd: Any, initial: Any = None, *, read_out: bool) -> np.ndarray:
    """Reduce `values` by operator `by` into the engine's registers, as `cmd` says; returns their content.

    read_out: whether the instruction stores that content; else it waits for the next one of the chain.
    Error where a chain goes on with registers that another instruction reset meanwhile.
    """
    registers, on = _machine.current().registers, _machine.current().instruction.engine
    partitions = values.shape[0]
    before: Accumulator | None = registers.get(on)
    check((initial is not None) == (cmd == commands.load_reduce), "reduce_init",
          "a value with reduce_cmd.load_reduce, and only then", f"{initial} with {cmd}")  # fmt: skip
    now = Accumulator(np.zeros(hardware.PARTITIONS, np.float32), by, kernel_line())
    if cmd in (commands.reset_reduce, commands.reset):
        now.values[:] = ops.IDENTITY[by]
    elif cmd == commands.load_reduce:
        now.values[:partitions] = np.reshape(scalar("reduce_init", initial, partitions), -1)
    else:
        if before is None:
            fail("reduce_cmd", "a reset before the first reduce", cmd)
        _goes_on(before, by)
        now.values, now.lost = before.values.copy(), before.lost
    if cmd not in (commands.reduce, commands.idle) and before is not None and not before.read_out:
        now.lost = before.line
    if cmd in (commands.reduce, commands.reset_reduce, commands.load_reduce):
        with np.errstate(all="ignore"):
            now.values[:partitions] = ops.ARITHMETIC[by](now.values[:partitions], ops.reduce(by, values))
    now.read_out = read_out
    registers[on] = now
    return now.values[:partitions].copy()


def _goes_on(before: Accumulator, by: str) -> None:
    """A chain goes on: the registers must be its own."""
    check(not before.unsure, "reduce_cmd", "reset_reduce: an instruction that may change the accumulator ran "
          "since the last reset", "reduce")  # fmt: skip
    check(before.operator == by, "reduce_cmd", f"the accumulator of a chain of nl.{by}",
          f"one that nl.{before.operator} has used since, at {before.line}")  # fmt: skip
    clobbered = before.lost and before.read_out
    check(not clobbered, "reduce_cmd", "the accumulator as this chain left it",
          f"one that was reset at {before.line}, before the chain of {before.lost} was read out")  # fmt: skip


def may_change() -> None:
    """The running instruction leaves the engine's registers in a state that is not documented."""
    before = _machine.current().registers.get(_machine.current().instruction.engine)
    if before is not None:
        before.unsure = True
