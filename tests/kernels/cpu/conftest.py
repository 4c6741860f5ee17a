"""Runs what asks for ``isa`` once on each instruction-set level this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.backends import cpu

# Without the kernels this must be collected all the same: on a Neuron machine `pytest -m neuron` comes by.
MISSING = cpu.unavailable()
LEVELS = [pytest.param("none", marks=pytest.mark.skip(reason=MISSING))] if MISSING else cpu.isas()


@pytest.fixture(scope="module", params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the level in force, one of ``cpu.isas()``."""
    settings.current()  # first, or the first op would do it and put the setting's level in force
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("auto")
