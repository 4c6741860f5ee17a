"""``vllm-neuron-rmsq quantize`` and ``--version``: what they say and leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from checkpoints import is_linear, load, write_llama
from typer.testing import CliRunner

import vllm_neuron_rmsq
from vllm_neuron_rmsq.checkpoint import convert
from vllm_neuron_rmsq.cli import app, smollm2
from vllm_neuron_rmsq.cli.errors import CommandError


def stopped_half_way(source: Path, out: Path, signal_number: int) -> int:
    """Run the command in a process that sends itself a signal when half of the tensors are done."""
    program = f"""
        import os, pathlib, sys
        from vllm_neuron_rmsq import checkpoint
        import vllm_neuron_rmsq.cli as cli
        original = checkpoint.convert

        def convert(source, out, target, progress, **options):
            def tell(done, total, name):
                if done == total // 2:
                    os.kill(os.getpid(), {signal_number})
            return original(source, out, target, tell, **options)

        checkpoint.convert = convert
        sys.argv = ["vllm-neuron-rmsq", "quantize", {str(source)!r}, {str(out)!r}]
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    return done.returncode


@pytest.mark.engine
def test_terminated_half_way_leaves_nothing(tmp_path):
    source = write_llama(tmp_path / "bf16", shards=3)
    assert stopped_half_way(source, tmp_path / "fp8", signal.SIGTERM) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["bf16"]


@pytest.mark.engine
def test_killed_half_way_leaves_no_checkpoint(tmp_path):
    """What nobody can clean up after: the directory is not there, so nothing can mistake it for complete."""
    source = write_llama(tmp_path / "bf16", shards=3)
    assert stopped_half_way(source, tmp_path / "fp8", signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "fp8").exists()
    assert len(convert(source, tmp_path / "fp8").layers) == 14


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


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"vllm-neuron-rmsq {vllm_neuron_rmsq.__version__}\n")
