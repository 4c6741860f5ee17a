"""Runs what asks for ``isa`` once on each instruction-set level this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.backends import cpu


@pytest.fixture(scope="module", params=cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the level in force, one of ``cpu.isas()``."""
    settings.current()  # first, or the first op would do it and put the setting's level in force
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("auto")
