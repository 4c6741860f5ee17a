"""``vllm-neuron-rmsq check``: what it prints of the answers in ``test_check.py``, and its exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest
from neuron_standin.run import environment
from rich.console import Console
from typer.testing import CliRunner

from vllm_neuron_rmsq import check
from vllm_neuron_rmsq.cli import app
from vllm_neuron_rmsq.cli.check import show_environment, show_model

FOUND = {
    "active": True,
    "reasons": [],
    "plugin": "0.1.0",
    "python": "3.11.0",
    "machine": "x86_64",
    "packages": {"vllm": "0.32.0", "torch": None},
    "compiler": None,
    "cpu": {
        "usable": 4,
        "instruction_sets": ["portable"],
        "in_force": "portable",
        "ranks": [[0, 1]],
        "reserved": [3],
    },
    "backends": {
        "nki": {"usable": False, "serves": False, "details": "", "reason": "there is no [Neuron] device"},
        "cpu": {"usable": True, "serves": True, "details": "instruction sets portable", "reason": None},
        "nki-sim": {"usable": True, "serves": False, "details": "", "reason": None},
    },
    "settings": {"backend": "auto", "target": "trn2"},
    "vllm": {
        "version": "0.32.0",
        "supported": "0.24 to 0.33",
        "platform": "cpu",
        "missing": [],
        "patches": {"model_loader": "something of ours"},
    },
    "neuron": None,
}


def printed(show, *arguments) -> list[str]:
    console = Console(width=200, record=True)
    show(*arguments, console)
    return console.export_text().splitlines()


def rows(lines: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    return {name: rest for name, *rest in cells}


def test_an_environment():
    lines = printed(show_environment, FOUND)
    table = rows(lines)
    assert table["torch"] == ["not installed"]
    assert table["C++ compiler"] == ["none found; native kernels cannot be built here"]
    assert table["nki"] == ["there is no [Neuron] device"]
    assert table["cpu"] == ["can run: instruction sets portable"]
    assert table["nki-sim"] == ["can run, when asked for by name"]
    assert table["version"] == ["0.32.0; the plugin takes 0.24 to 0.33"]
    assert table["CPUs of a rank's threads"] == ["0, 1 of 4; left to the rest: 3"]
    assert table["patch model_loader"] == ["something of ours"]
    assert lines[-1] == "The plugin is active when vLLM starts."
    titles = [line.split("┃")[1:-1] for line in lines if line.startswith("┃")]
    assert len(titles) == 3
    assert all(title.strip() for row in titles for title in row)
    bare = FOUND | {
        "active": False,
        "reasons": ["no vLLM", "no torch"],
        "vllm": None,
        "backends": {},
        "settings": None,
    }
    lines = printed(show_environment, bare)
    assert lines[-2:] == ["The plugin would do nothing: no vLLM", "The plugin would do nothing: no torch"]


def test_layers_of_a_kind_share_a_row():
    norms = [
        {
            "name": f"model.layers.{layer}.input_layernorm",
            "reason": "" if layer else "LoRA",
            "linears": [f"model.layers.{layer}.qkv_proj"],
        }
        for layer in range(12)
    ]
    linears = [{"name": "lm_head", "scheme": "", "reason": "not FP8"}]
    linears += [
        {"name": f"model.layers.{layer}.qkv_proj", "scheme": "per-token", "reason": ""} for layer in range(12)
    ]
    report = {"summary": "11 of 12", "norms": norms, "activations": [], "linears": linears}
    lines = printed(show_model, "some[model]", report)
    assert lines[0] == "some[model]: 11 of 12"
    found = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in found] == [
        ["model.layers.*.input_layernorm", "1", "stock: LoRA"],
        ["model.layers.*.input_layernorm", "11", "fused, feeds model.layers.*.qkv_proj"],
        ["lm_head", "1", "stock: not FP8"],
        ["model.layers.*.qkv_proj", "12", "multiplies packed rows, scheme per-token"],
    ]


@pytest.mark.parametrize(
    ("found", "status"),
    [(FOUND, 0), (FOUND | {"active": False, "reasons": ["it is off"]}, 1)],
)
def test_exit_status(found, status, monkeypatch):
    monkeypatch.setattr(check, "environment", lambda: found)
    assert CliRunner().invoke(app, ["check", "--json"]).exit_code == status
    # A model that the plugin does not get to see: the environment says why.
    monkeypatch.setattr(check, "model", lambda path: {})
    assert CliRunner().invoke(app, ["check", "model"]).exit_code == status


@pytest.mark.engine
def test_on_vllm_neuron_it_says_what_would_be_served():
    """With the stand-in for vLLM Neuron installed, in a process of its own: vLLM has one platform there."""
    program = "from vllm_neuron_rmsq.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "check"],
        env=environment(COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout.splitlines())
    assert table["vllm-neuron"] == ["0.24.0.1.1.0; written for 0.24.0.1.1.0 and 0.29.0.1.2.0"]
    assert table["nki"][0].startswith("this machine has no Neuron device")
    assert table["neuronx-cc"] == ["not installed"]
    assert table["patch neuron_registry"]
    served = "would be served in row FP8: attention bf16, gathering uint8, backend cpu"
    assert table["FP8-dynamic Llamas"] == [served]
