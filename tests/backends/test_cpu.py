"""Backend cpu without its library: the package works, says why it is slow, and what mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_neuron_rmsq import backends, ops, reference, settings
from vllm_neuron_rmsq.backends import cpu
from vllm_neuron_rmsq.kernels.cpu.digest import digest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget_what_was_found():
    yield
    settings.install(None)
    cpu.set_isa("auto")
    backends.resolve.cache_clear()


@pytest.fixture
def without_library(tmp_path, monkeypatch):
    """The package as it is where the build made no library; the file the reason goes into."""
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu_kernels.so")
    monkeypatch.setattr(cpu, "REASON", tmp_path / "_cpu_kernels.txt")
    cpu._load.cache_clear()
    backends.resolve.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu._load.cache_clear()


def test_auto_is_cpu_on_cpu():
    assert backends.resolve("auto", "cpu") == "cpu"


def test_no_library(without_library):
    cpu.REASON.write_text("torch was not found by the build\n")
    message = r"not built: torch was not found by the build; reinstall with pip install --no-build-isolation"
    with pytest.raises(backends.BackendUnavailableError, match=message):
        backends.resolve("cpu", "cpu")
    assert backends.resolve("auto", "cpu") == "torch"
    hidden = torch.randn(3, 40)
    assert torch.equal(ops.rms_norm_quant(hidden, None), reference.rms_norm_quant(hidden, None))


def test_never_installed(without_library):
    assert "the package was never installed here; reinstall" in backends.unavailable("cpu")


def test_library_that_does_not_load(without_library):
    cpu.LIBRARY.write_bytes(b"not a library")
    assert "cannot be loaded" in backends.unavailable("cpu")
    assert "reinstall with pip install --no-build-isolation" in backends.unavailable("cpu")


def test_library_of_other_sources_is_not_loaded(without_library, monkeypatch):
    """Calling it would end the process: its functions take other arguments."""
    installed = (ROOT / "vllm_neuron_rmsq/_cpu_kernels.so").read_bytes()
    for library in (
        installed.replace(digest().encode(), b"0123456789abcdef"),
        installed.replace(b"rmsq", b"????"),
    ):
        assert library != installed
        cpu.LIBRARY.write_bytes(library)
        reason = "they were built from other sources than those installed beside them; reinstall with pip"
        assert reason in backends.unavailable("cpu")
        assert backends.resolve("auto", "cpu") == "torch"
        assert str(cpu.LIBRARY) not in torch.ops.loaded_libraries


def test_comments_and_spaces_do_not_make_other_sources(tmp_path, monkeypatch):
    source = tmp_path / "a.cpp"
    monkeypatch.setitem(digest.__globals__, "__file__", str(tmp_path / "digest.py"))
    found = []
    for text in ("int a;\n", "int a; // a\n", "int  a;\n\n", "int b;\n"):
        source.write_text(text)
        found.append(digest())
    assert found[0] == found[1] == found[2] != found[3]


def test_chosen_level_is_put_in_force_and_must_be_there(monkeypatch):
    chosen = []
    monkeypatch.setattr(cpu, "set_isa", chosen.append)
    for level in ("portable", "avx2"):
        settings.install(settings.Settings(cpu_isa=level))
    assert chosen == ["portable", "avx2"]
    settings.install(settings.Settings(backend="torch", cpu_isa="avx2"))
    assert chosen == ["portable", "avx2"], "another backend was chosen"


def test_asking_changes_nothing(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_CPU_ISA", "portable")
    monkeypatch.setattr(cpu, "set_isa", lambda name: pytest.fail("a question switched the instruction set"))
    assert backends.unavailable("cpu") is None


def test_the_environments_level_is_put_in_force(monkeypatch):
    chosen = []
    monkeypatch.setattr(cpu, "set_isa", chosen.append)
    monkeypatch.setenv("VLLM_RMSQ_CPU_ISA", "portable")
    settings.install(None)
    ops.rms_norm_quant(torch.randn(3, 40), None)
    assert chosen == ["portable"]


def test_level_the_machine_lacks():
    with pytest.raises(
        ValueError, match=r"cpu_isa: expected auto or one this machine has \(portable.*got 'sve'"
    ):
        cpu.set_isa("sve")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "false", "CXX": "false"}, "false' failed with exit code 1"),
        ({"CC": "no-such-compiler", "CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"CXXFLAGS": "-include no-such-header.h"}, "fatal error: no-such-header.h: No such file"),
        ({"CC": "./compiler", "CXX": "./compiler"}, "a.h:3:5: error: the first"),
    ],
)
def test_a_failing_build_installs_the_reason(environment, reason, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        "echo 'In file included from error.cpp:1:\na.h:3:5: error: the first\na.h:9:5: error: another' >&2\n"
        "exit 1\n"
    )
    compiler.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels/cpu", "vllm_neuron_rmsq"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "*.txt")
        )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "built/vllm_neuron_rmsq/_cpu_kernels.so").exists()
    assert (tmp_path / "built/vllm_neuron_rmsq/_cpu_kernels.txt").read_text().count(reason) == 1
    assert "native CPU kernels not built" in done.stdout + done.stderr
