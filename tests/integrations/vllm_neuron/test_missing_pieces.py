"""FP8 codes are never read as bf16 numbers, whatever piece is missing: something refuses, and says what."""

from __future__ import annotations

import subprocess
import sys

import pytest
from neuron_llamas import write
from neuron_standin.run import HERE, environment

REFUSAL = "Neuron only supports compressed-tensors for KV cache quantization"
UNKNOWN = "Model architectures ['RowFp8LlamaForCausalLM'] are not supported"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    checkpoint = write(folder / "plain")

    def start(mode: str, **env: str) -> str:
        command = [sys.executable, str(HERE / "pieces.py"), mode, str(checkpoint), str(folder / "config")]
        done = subprocess.run(
            command,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return done.stdout

    return start


def test_a_worker_without_the_plugin(run):
    assert "LET THROUGH AS RowFp8LlamaForCausalLM" in run("front end")
    said = run("worker without it", VLLM_PLUGINS="neuron")
    assert UNKNOWN in said and "SERVED BY" not in said
    said = run("registered later")  # the plugin is there, but the worker has registered its models before
    assert UNKNOWN in said and "SERVED BY" not in said


def test_a_registry_that_lost_its_patch(run):
    said = run("registry as it was")
    assert REFUSAL in said and "SERVED BY" not in said


def test_a_name_of_vllm_neuron_that_is_missing(run):
    said = run("a name is missing")
    assert REFUSAL in said and "SERVED BY" not in said
    (line,) = [line for line in said.splitlines() if "is inactive" in line]
    assert "vllm_neuron.functional.attention_decode is missing. FP8 weights stay refused" in line


def test_another_llama_registered_over_ours(run):
    assert "SERVED BY RowFp8LlamaForCausalLM" in run("another Llama over ours")


def test_every_name_is_missed(run):
    said = run("names")
    assert "NOT FOUND" not in said
    assert int(said.rpartition("LOOKED FOR ")[2]) > 70
