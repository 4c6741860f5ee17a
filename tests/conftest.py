"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import hypothesis
import pytest
import torch

from vllm_neuron_rmsq import backends
from vllm_neuron_rmsq.cli import smollm2

# vLLM would take nine tenths of the machine for each engine's KV cache; 1 GiB is plenty here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# pytest-xdist's workers share the machine: each has one thread, and its engines have one core, which vLLM
# would choose to be the same for all.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)])
    )

# A test's time depends on what else the machine does, so none is held to one. `make fast` tries fewer inputs.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=10)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--once", action="store_true", help="each test with the first of its parameters only")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is under ``tests/e2e/``, and whatever needs SmolLM2, which may have to be fetched."""
    if "e2e" in item.path.parts or {"smollm2_bf16", "smollm2_fp8"} & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.engine)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Obey ``--once``."""
    if config.getoption("--once"):
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
        chosen, others = [i for i in items if i in first], [i for i in items if i not in first]
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    """``.cache/`` of the checkout: what takes long to make and outlives a test run."""
    return pytestconfig.rootpath / ".cache"


@pytest.fixture(scope="session")
def smollm2_bf16(cache: Path) -> Path:
    """Checkpoint directory of SmolLM2-135M-Instruct, unquantized."""
    with _making(cache):
        return smollm2.bf16(cache)


@pytest.fixture(scope="session")
def smollm2_fp8(cache: Path) -> Path:
    """Checkpoint directory of SmolLM2-135M-Instruct in FP8, codes within ±240."""
    with _making(cache):
        return smollm2.fp8(cache)


def _making(cache: Path) -> filelock.FileLock:
    """Held while the model is made: another worker waits and then finds it."""
    cache.mkdir(exist_ok=True)
    return filelock.FileLock(cache / "smollm2.lock")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test starts from the same random numbers, whatever ran before it in this worker.

    Tests that need Trainium, asked for where there is none, say what is missing.
    """
    torch.manual_seed(0)
    if item.get_closest_marker("neuron"):
        reason = backends.unavailable("nki")
        if reason is not None:
            pytest.skip(reason)
