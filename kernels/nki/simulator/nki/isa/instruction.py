"""``@instruction``: what every instruction has in common around the one step that it computes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, cast

from ... import cost_model
from ... import machine as _machine
from ...operands import check, issue
from ...tensor import NKIObject, NkiTensor
from .constants import engine as engines

P = ParamSpec("P")


class NkiInstruction(NKIObject):
    """What an instruction returns; instructions run in program order here."""

    def depends_on(self, *producers: NkiInstruction) -> NkiInstruction:
        """Order this one after `producers`: always so here."""
        return self


DONE = NkiInstruction()


@dataclass(frozen=True, slots=True)
class Busy:
    """What an instruction asks of a compute engine.

    cycles: how long (``careful``: under the slower reading of the documents, where there are two).
    operands: what it streams; constants and None among them do not count.
    """

    cycles: float
    operands: tuple[Any, ...]
    careful: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What an instruction asks of the DMA engines: bytes, at `share` of the bandwidth."""

    dst: NkiTensor
    sources: list[NkiTensor]
    share: float = 1.0


def instruction(
    engine: str | tuple[str, ...],
) -> Callable[[Callable[P, Busy | Moved | None]], Callable[P, NkiInstruction]]:
    """Make the decorated function the instruction of its name: checks, one NumPy step, its cost.

    engine: who runs it. Where there are several, the caller's ``engine`` argument chooses among them, the
    first by default, and the function finds the chosen one's name in place of that argument. Where the
    choice depends on the operands, the function calls :func:`choose` itself.
    The function returns what it keeps busy: :class:`Busy`, :class:`Moved`, or None for nothing. Messages of
    its checks begin with its name.
    """
    allowed = (engine,) if isinstance(engine, str) else engine

    def decorate(compute: Callable[P, Busy | Moved | None]) -> Callable[P, NkiInstruction]:
        name = compute.__name__
        position = list(inspect.signature(compute).parameters).index("engine") if len(allowed) > 1 else None

        @functools.wraps(compute)
        def issued(*args: P.args, **kwargs: P.kwargs) -> NkiInstruction:
            here = _machine.current()
            outer, here.instruction = here.instruction, _machine.Instruction(f"nki.isa.{name}", allowed[0])
            try:
                given, named = list(args), cast(dict[str, Any], kwargs)
                if position is not None and position < len(given):
                    given[position] = choose(given[position], *allowed)
                elif position is not None:
                    named["engine"] = choose(named.get("engine", engines.unknown), *allowed)
                work = cast(Callable[..., Any], compute)(*given, **named)
                if isinstance(work, Moved):
                    cost_model.dma(name, work.dst, work.sources, work.share)
                elif work is not None:
                    issue(name, here.instruction.engine, work.cycles, *work.operands, careful=work.careful)
            finally:
                here.instruction = outer
            return DONE

        return issued

    return decorate


def choose(given: Any, default: str, *others: str) -> str:
    """The engine that runs this instruction: `given`, which must be allowed, or `default`."""
    chosen = default if given == engines.unknown else getattr(given, "name", str(given))
    check(chosen in (default, *others), "engine", " or ".join((default, *others)), chosen)
    _machine.current().instruction.engine = chosen
    return chosen
