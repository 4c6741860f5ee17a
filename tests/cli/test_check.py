"""``vllm-neuron-rmsq check``: what can run here, and why the rest cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import vllm
from neuron_standin.run import environment
from rich.console import Console

from vllm_neuron_rmsq import backends
from vllm_neuron_rmsq.cli.check import check
from vllm_neuron_rmsq.cli.errors import CommandError


def printed() -> str:
    console = Console(width=200, record=True)
    check(console)
    return console.export_text()


def test_versions_and_every_backend_are_listed(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")
    text = printed()
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(backends.names()) <= set(rows)
    assert "can run" in rows["torch"]
    assert "VLLM_RMSQ_BACKEND=torch" in text
    titles = [line.split("┃")[1:-1] for line in text.splitlines() if line.startswith("┃")]
    assert len(titles) == 3
    assert all(title.strip() for row in titles for title in row)


def test_the_installed_vllm_and_what_would_become_of_fp8_linears(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")
    text = printed()
    assert f"{vllm.__version__}; supported are 0.24 to 0.33" in text
    assert "has every name that it needs" in text
    assert "would multiply packed rows: backend torch, target trn2" in text
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "off")
    assert "stay vLLM's own: the plugin is switched off (VLLM_RMSQ_BACKEND=off)" in printed()


@pytest.mark.parametrize(("version", "reason"), [("0.34.1", "newer"), ("0.23.0", "older")])
def test_a_vllm_that_is_not_supported(version, reason, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", version)
    text = printed()
    assert f"{version}; supported are 0.24 to 0.33" in text
    assert f"is inactive: {reason} than any it was tried with" in text


def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "nki")
    with pytest.raises(CommandError, match="VLLM_RMSQ_BACKEND=nki cannot run here: "):
        printed()


def test_a_misspelt_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_TARGT", "trn2")
    with pytest.raises(CommandError, match="VLLM_RMSQ_TARGT: unknown environment variable; expected one of"):
        printed()


@pytest.mark.engine
def test_on_vllm_neuron_it_says_what_would_be_served():
    """With the stand-in for vLLM Neuron installed, in a process of its own: vLLM has one platform there."""
    program = (
        "from rich.console import Console\n"
        "from vllm_neuron_rmsq.cli.check import check\n"
        "check(Console(width=200))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=True)
    cells = [line.split("\u2502") for line in done.stdout.splitlines() if line.startswith("\u2502")]
    rows = {name.strip(): said.strip() for _, name, said, _ in cells}
    assert rows["vllm-neuron"] == "0.24.0.1.1.0; written for 0.24.0.1.1.0 and 0.29.0.1.2.0"
    assert rows["nki"].startswith("this machine has no Neuron device")
    assert rows["neuronx-cc"] == "not installed"
    assert rows["its names that are needed"] == "all there"
    served = "would be served in row FP8: attention bf16, gathering uint8, backend cpu"
    assert rows["FP8-dynamic Llamas"] == served
