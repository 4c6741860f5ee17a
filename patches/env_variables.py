"""Patch: vLLM knows the plugin's environment variables.

What: adds ``VLLM_RMSQ_*`` to ``vllm.envs.environment_variables``.
Why: vLLM warns of every ``VLLM_`` variable that is not in there ("Unknown vLLM environment variable
    detected"), which makes a right setting look like a wrong one.
Versions: vLLM 0.24 to 0.33 (the warning as of 0.18).
Delete when: plugins can declare variables, or vLLM asks only for its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable


def apply(known: dict[str, Callable], names: Iterable[str]) -> None:
    """Add ``names`` to ``known``, vLLM's variables; a second call changes nothing."""
    for name in names:
        known.setdefault(name, functools.partial(os.environ.get, name))
