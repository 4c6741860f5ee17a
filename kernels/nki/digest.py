"""A number that changes when a kernel does, so that a compile cache never serves an old one."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import vllm_neuron_rmsq


@functools.cache
def digest() -> int:
    """Return 31 bits of SHA-256 over the package's version and the sources of the kernels.

    Graph compilers know a kernel by its name and its arguments. The kernels that PyTorch calls take this
    number as one more argument, and do nothing with it. The simulator's sources do not count.
    """
    total = hashlib.sha256(vllm_neuron_rmsq.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return int.from_bytes(total.digest()[:4]) & 0x7FFFFFFF
