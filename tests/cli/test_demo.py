"""``vllm-neuron-rmsq demo``, short of generating, which ``make demo`` shows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console

from vllm_neuron_rmsq.cli.demo import (
    ANSWER_TOKENS,
    MAX_TOKENS,
    QUESTIONS,
    SIDES,
    _answers,
    _layers,
    _speeds,
    demo,
)
from vllm_neuron_rmsq.cli.errors import CommandError
from vllm_neuron_rmsq.measure.engine import STOCK, Engine


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
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows == [["with the plugin", "5.0", "1.0 to 9.0"], ["without it", "2.0", "2.0 to 2.0"]]


def test_both_sides_answers_are_shown():
    table = _answers({question: dict(zip(SIDES, ("Paris", "Rome"), strict=True)) for question in QUESTIONS})
    assert all(column.header for column in table.columns)
    assert table.title
    rows = [line for line in text(table).splitlines() if line.startswith("│")]
    assert len(rows) == len(QUESTIONS)
    assert all("Paris" in row and "Rome" in row for row in rows)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CommandError, match="nothing: is not a directory; expected an FP8 checkpoint"):
        demo(tmp_path / "nothing", tmp_path / "cache", 1, Console())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
@pytest.mark.parametrize(
    ("package", "command", "said"),
    [
        ("vllm", ["demo"], "error: vLLM is not installed beside "),
        ("torch", ["validate", "model"], "error: the package torch is not installed; install vLLM"),
    ],
)
def test_without_a_package_one_sentence_says_so(package, command, said, tmp_path):
    program = f"import sys; sys.modules[{package!r}] = None; from vllm_neuron_rmsq.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("quantized", "environment"), [(True, {}), (True, STOCK), (False, STOCK)])
def test_every_side_answers_rightly(quantized, environment, smollm2_bf16, smollm2_fp8, tmp_path):
    """The plugin, and stock vLLM in FP8 and bf16: what a reader of the table judges them by."""
    checkpoint = smollm2_fp8 if quantized else smollm2_bf16
    side = Engine(checkpoint, tmp_path / "vllm.log", environment, max_model_len=MAX_TOKENS, max_num_seqs=3)
    try:
        side.ask()
        answers = side.chat(QUESTIONS, ANSWER_TOKENS)
    finally:
        side.close()
    for answer, city in zip(answers, ("Paris", "Tokyo", "Berlin"), strict=True):
        assert city in answer


@pytest.mark.engine
def test_what_vllm_cannot_load_shows_the_end_of_its_log(tmp_path):
    side = Engine(tmp_path, tmp_path / "vllm.log")
    with pytest.raises(ValueError, match=r"(?s)vLLM stopped; the end of its log .*vllm.log:\n.*Error"):
        side.ask()
    side.close()
