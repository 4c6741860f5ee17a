"""The number that tells one version of the kernels from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vllm_neuron_rmsq
from vllm_neuron_rmsq.kernels.nki import digest as source


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' folder that the digest is taken of."""
    folder = tmp_path / "nki"
    shutil.copytree(Path(source.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "__file__", str(folder / "digest.py"))
    return folder


def fresh() -> int:
    source.digest.cache_clear()
    try:
        return source.digest()
    finally:
        source.digest.cache_clear()


def test_an_int_of_31_bits_always_the_same():
    first = fresh()
    assert 0 <= first < 2**31
    assert fresh() == first


def test_a_changed_kernel_changes_it(kernels):
    before = fresh()
    path = kernels / "packed_fp8_linear.py"
    path.write_text(path.read_text() + "\n")
    assert fresh() != before


def test_another_version_changes_it(kernels, monkeypatch):
    before = fresh()
    monkeypatch.setattr(vllm_neuron_rmsq, "__version__", "0.0.0")
    assert fresh() != before


def test_the_simulator_does_not_count(kernels):
    before = fresh()
    (kernels / "simulator" / "run.py").write_text("")
    assert fresh() == before
