"""Our kernels give the simulator nothing to warn of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationWarning


@pytest.fixture(autouse=True)
def doubtful_is_wrong() -> Iterator[None]:
    """What is doubtful on the hardware fails a test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NkiSimulationWarning)
        yield
