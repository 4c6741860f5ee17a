"""``vllm-neuron-rmsq check``: what can run here, and why the rest cannot."""

from __future__ import annotations

import pytest
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
    assert len(titles) == 2
    assert all(title.strip() for row in titles for title in row)


def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "nki")
    with pytest.raises(CommandError, match="VLLM_RMSQ_BACKEND=nki cannot run here: "):
        printed()


def test_a_misspelt_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_TARGT", "trn2")
    with pytest.raises(CommandError, match="VLLM_RMSQ_TARGT: unknown environment variable; expected one of"):
        printed()
