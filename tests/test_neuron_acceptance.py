"""benchmarks/neuron_acceptance.py as far as it runs without the Neuron SDK: steps, verdicts, its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import neuron_acceptance as acceptance


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a step and returns its exit code, what it printed and its checks."""
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")  # which the steps change, put back afterwards
    out = tmp_path / "results.json"

    def step(name, *arguments):
        done = CliRunner().invoke(acceptance.app, [name, "--out", str(out), *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        content = json.loads(out.read_text())
        return done.exit_code, done.output, content["steps"][name]["checks"], content

    return step


def test_kernels(run):
    code, printed, checks, content = run("kernels")
    assert code == 0, printed
    assert len(checks) == 30 and all(check["passed"] for check in checks)
    assert {check["simulator"] for check in checks if "simulator" in check} == {
        "ours: the Neuron SDK is not installed"
    }
    assert content["packages"]["vllm-neuron-rmsq"]


def test_a_wrong_kernel_fails(run, monkeypatch):
    from vllm_neuron_rmsq import ops

    right = ops.rms_norm_quant
    monkeypatch.setattr(ops, "rms_norm_quant", lambda x, w, **k: right(x * 1.05, w, eps=0.3, **k))
    code, printed, checks, _ = run("kernels")
    assert code == 1
    failed = [check for check in checks if not check["passed"]]
    assert failed and all("rms_norm_quant" in check["name"] for check in failed)
    assert "expected scales within 2^-7" in printed


def test_steps_gather_in_one_file_and_say_what_is_missing(run):
    run("kernels")
    code, printed, checks, content = run("compile")
    assert code == 1 and set(content["steps"]) == {"kernels", "compile"}
    assert len(checks) == 6 and "vllm-neuron is not installed" in printed


@pytest.mark.engine
def test_cpu_mode(run, monkeypatch):
    monkeypatch.setattr(acceptance, "RANKS", (1,))
    monkeypatch.setattr(acceptance, "BACKENDS", ("torch", "cpu"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine's process has vLLM to import again
    code, printed, checks, _ = run("cpu-mode")
    assert code == 0, printed
    assert [check["platform"] for check in checks] == ["vLLM for CPU: no Neuron SDK"] * 2
    assert checks[1]["choices_compared"] > 1
    assert "4 of 5 RMSNorm layers fused" in checks[0]["report"][0]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_hardware_step_on_a_cpu(run, monkeypatch, smollm2_fp8, smollm2_bf16):
    """The step for a Trainium2, on what this machine has: everything but the device's memory is found."""
    monkeypatch.setattr(acceptance, "BATCHES", (1, 2))
    monkeypatch.setattr(acceptance, "PLACES", 8)
    arguments = ["--model", str(smollm2_fp8), "--bf16", str(smollm2_bf16), "--tensor-parallel", "1"]
    code, printed, checks, _ = run(
        "hardware", *arguments, "--max-model-len", "1024", "--prompt-tokens", "128", "--no-reference"
    )
    assert code == 0, printed
    ours, bf16 = checks[1:]
    assert abs(ours["next_token_loss"] - bf16["next_token_loss"]) < 0.5
    assert set(ours["times"]) == {"1", "2"} and ours["device_bytes"] is None


def output(tokens, *leads):
    logprobs = [{str(t): -0.1, "99": -0.1 - lead} for t, lead in zip(tokens, leads, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


def test_choices_are_compared_as_far_as_texts_are_equal():
    theirs = [output([1, 2, 3], 1.0, 0.05, 1.0)]
    assert acceptance.same_choices([output([1, 2, 3], 1.0, 0.05, 1.0)], theirs)["choices_compared"] == 3
    near_tie = [output([1, 4, 5], 1.0, 0.2, 1.0)]
    assert acceptance.same_choices(near_tie, theirs)["choices_compared"] == 2
    with pytest.raises(ValueError, match=r"prompt 0, token 0: expected 1, which leads by 1.00, got 7"):
        acceptance.same_choices([output([7, 2, 3], 1.0, 0.05, 1.0)], theirs)
