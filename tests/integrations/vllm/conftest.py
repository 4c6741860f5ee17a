"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_neuron_rmsq import settings


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    """Forget after a test what a model loaded in it was set to."""
    yield
    settings.install(None)
