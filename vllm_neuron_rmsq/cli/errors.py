"""The error of the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do. Shown without a trace."""


@contextlib.contextmanager
def shown_without_trace() -> Iterator[None]:
    """Turn the ValueError by which the library refuses what the user gave into a CommandError."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error
