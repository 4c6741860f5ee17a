"""What the simulator raises, and how it finds the line of the kernel that is to blame."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_HERE = str(Path(__file__).parent)


class NkiSimulationError(Exception):
    """A kernel broke a rule of the hardware or of the NKI language.

    The message names the instruction, the operand, what the rule expects, what came instead, and the
    kernel's source line. It is deliberately no AssertionError: a kernel's own asserts stay tellable apart.
    """


class NkiSimulationWarning(UserWarning):
    """A kernel did what is doubtful on the hardware: the documents advise against it, or are silent on it."""


class NotCovered(NotImplementedError, AttributeError):
    """A name of the NKI API that the simulator does not have; to ``hasattr`` it is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not covered by this simulator")


def kernel_line() -> str:
    """``file:line: source`` of the innermost frame outside the simulator: the kernel's line."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    if not frame:
        return "unknown source"
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{name}:{number}: {linecache.getline(name, number).strip()}"


def fail(instruction: str, operand: str, expected: str, got: Any) -> NoReturn:
    """Raise :class:`NkiSimulationError` for `operand` of `instruction`."""
    raise NkiSimulationError(
        f"{instruction}: {operand}: expected {expected}, got {got}\n  at {kernel_line()}"
    )


def check(condition: bool, instruction: str, operand: str, expected: str, got: Any) -> None:
    """:func:`fail` unless `condition` holds."""
    if not condition:
        fail(instruction, operand, expected, got)
