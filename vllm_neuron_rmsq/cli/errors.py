"""The error of the command line, and exit statuses: 0 yes, 1 no, 2 wrong use or bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

NO, BAD_INPUT = 1, 2

BROUGHT_BY_VLLM = ("torch", "transformers", "numpy")


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do. Shown without a trace.

    Args:
        message: what is shown.
        status: exit status; ``NO`` where the question was understood and the answer is no.
    """

    def __init__(self, message: str, status: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def shown_without_trace() -> Iterator[None]:
    """Turn what the user can mend into a CommandError: a ValueError of the library, a missing package."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*BROUGHT_BY_VLLM, "vllm"):
            raise
        remedy = "install vLLM" if package == "vllm" else f"install vLLM, which brings {package}"
        raise CommandError(
            f"the package {package} is not installed; {remedy}, in this environment"
        ) from error
