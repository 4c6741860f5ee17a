"""``vllm-neuron-rmsq demo``, short of generating, which ``make demo`` shows."""

from __future__ import annotations

import pytest
from rich.console import Console

from vllm_neuron_rmsq.cli.demo import Side, _layers, _speeds, demo
from vllm_neuron_rmsq.cli.errors import CommandError


def text(renderable) -> str:
    console = Console(width=200, record=True)
    console.print(renderable)
    return console.export_text()


def test_layers_of_a_kind_share_a_row():
    norms = [
        {
            "name": f"model.layers.{layer}.input_layernorm",
            "reason": "" if layer else "LoRA",
            "linears": [f"model.layers.{layer}.self_attn.qkv_proj"],
        }
        for layer in range(12)
    ]
    table = _layers({"line": "11 of 12 fused", "backend": "cpu", "layers": norms})
    assert all(column.header for column in table.columns)
    shown = text(table)
    assert "11 of 12 fused" in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    assert "model.layers.*.input_layernorm " in rows[0]
    assert "not fused: LoRA" in rows[0]
    assert "model.layers.*.input_layernorm (11)" in rows[1]
    assert "fused on backend cpu, feeds model.layers.*.self_attn.qkv_proj" in rows[1]


def test_speeds_are_medians():
    table = _speeds({"with the plugin": [1.0, 9.0, 5.0], "without it": [2.0, 2.0, 2.0]})
    assert all(column.header for column in table.columns)
    shown = text(table)
    assert "5.0  (1.0 to 9.0)" in shown
    assert "2.0  (2.0 to 2.0)" in shown


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CommandError, match="nothing: is not a directory; expected an FP8 checkpoint"):
        demo(tmp_path / "nothing", tmp_path / "cache", 1, Console())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
def test_what_vllm_cannot_load_shows_the_end_of_its_log(tmp_path):
    side = Side(tmp_path, {}, tmp_path / "vllm.log")
    with pytest.raises(CommandError, match=r"(?s)vLLM stopped; the end of its log .*vllm.log:\n.*Error"):
        side.ask()
    side.close()
