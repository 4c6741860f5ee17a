"""Which backend a setting means."""

from __future__ import annotations

import pytest

from vllm_neuron_rmsq import backends


@pytest.fixture
def usable(monkeypatch):
    """Return a function that makes exactly the named backends usable."""
    backends.resolve.cache_clear()

    def only(*names):
        reasons = {name: None if name in names else "not here" for name in backends.names()}
        monkeypatch.setattr(backends, "unavailable", reasons.__getitem__)

    yield only
    backends.resolve.cache_clear()


@pytest.mark.parametrize(
    "names, device, expected",
    [
        (("cpu", "torch"), "cpu", "cpu"),
        (("torch",), "cpu", "torch"),
        (("torch",), "cuda", None),  # a GPU's own FP8 kernels beat plain torch
        (("nki", "torch"), "neuron", "nki"),
        (("torch",), "neuron", None),
        (("torch",), "xpu", None),
    ],
)
def test_auto_replaces_vllms_layers_only_where_it_helps(usable, names, device, expected):
    usable(*names)
    backend, reason = backends.for_serving("auto", device)
    assert backend == expected
    assert (reason == "") == (expected is not None)


def test_a_backend_asked_for_by_name_must_run(usable):
    usable("torch")
    assert backends.for_serving("torch", "cuda") == ("torch", "")
    with pytest.raises(backends.BackendUnavailableError, match="backend 'cpu' cannot run here: not here"):
        backends.for_serving("cpu", "cpu")


def test_off(usable):
    usable("cpu", "torch")
    assert backends.for_serving("off", "cpu") == (None, "is switched off (VLLM_RMSQ_BACKEND=off)")


def test_ops_run_anywhere(usable):
    usable("torch")
    assert backends.resolve("auto", "cuda") == "torch"
    with pytest.raises(backends.BackendUnavailableError, match="no backend computes on device 'xpu'"):
        backends.resolve("auto", "xpu")
    with pytest.raises(ValueError, match="backend: expected one of auto, nki, nki-sim, cpu, torch"):
        backends.resolve("gpu", "cpu")
