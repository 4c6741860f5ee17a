"""Every command of the README, run as it stands there on a small model, and what the README says of it.

A command that is not run here says which test runs it. A new command in the README fails this file until it
has a line here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import load
from vllm_models import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]

ELSEWHERE = {
    "make demo": "the workflow's job of that name, and tests/cli/test_demo.py",
    "make test": "the workflow's job of that name",
    "pip install --no-build-isolation .": "tests/test_packaging.py, which builds and unpacks that wheel",
    "vllm-neuron-rmsq check": "tests/cli/test_check.py",
    "vllm-neuron-rmsq check CHECKPOINT": "tests/test_check.py and tests/integrations/vllm/test_preview.py",
    "VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/vllm serve .cache/smollm2-fp8 --max-model-len 2048": (
        "tests/e2e/test_server.py, which reads the same line of the log"
    ),
    "vllm serve RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic --tensor-parallel-size 8": (
        "tests/integrations/vllm_neuron/test_serving.py, on a stand-in"
    ),
    ".venv/bin/vllm-neuron-rmsq validate .cache/smollm2-bf16": "tests/measure/test_validation.py",
    ".venv/bin/vllm-neuron-rmsq bench .cache/smollm2-bf16": "tests/measure/test_bench.py, the slow one",
}
OFFLINE = ".venv/bin/python examples/offline_generate.py .cache/smollm2-fp8"
HERE = {
    OFFLINE,
    f"VLLM_RMSQ_BACKEND=nki-sim {OFFLINE}",
    ".venv/bin/python -m pytest examples/layer_level_test.py",
    ".venv/bin/vllm-neuron-rmsq quantize .cache/smollm2-bf16 smollm2-trn2",
    ".venv/bin/vllm-neuron-rmsq inspect .cache/smollm2-fp8",
    ".venv/bin/python benchmarks/nki_cost.py",
}


def test_each_command_of_the_readme_is_tested():
    assert set(COMMANDS) == HERE | set(ELSEWHERE)
    for said in ELSEWHERE.values():
        for path in re.findall(r"tests/[\w/]+\.py", said):
            assert (ROOT / path).is_file(), path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm2_bf16) -> Path:
    """A Llama of two layers with SmolLM2's tokenizer, and ``fp8/`` in it: seconds for the simulator."""
    folder = tmp_path_factory.mktemp("readme") / "bf16"
    write_checkpoint(tiny_config("llama", vocab_size=49152), folder)
    for part in (folder, folder / "fp8"):
        for file in smollm2_bf16.glob("*token*"):
            (part / file.name).write_bytes(file.read_bytes())
        (part / "chat_template.jinja").write_bytes((smollm2_bf16 / "chat_template.jinja").read_bytes())
    return folder


def run(command: str, tiny: Path, folder: Path) -> str:
    """Run a command of the README in the checkout, with ``tiny`` for SmolLM2; return all it printed."""
    assert command in COMMANDS
    bin_folder = f"{Path(sys.executable).parent}/"
    for there, here in (
        (".venv/bin/", bin_folder),
        (".cache/smollm2-fp8", str(tiny / "fp8")),
        (".cache/smollm2-bf16", str(tiny)),
        ("smollm2-trn2", str(folder / "smollm2-trn2")),
    ):
        command = command.replace(there, here)
    words = shlex.split(command)
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(environment) :]
    if "/" not in words[0]:
        words[0] = bin_folder + words[0]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.engine
@pytest.mark.parametrize(
    ("backend", "command"),
    [
        ("nki-sim", f"VLLM_RMSQ_BACKEND=nki-sim {OFFLINE}"),
        pytest.param("cpu", OFFLINE, marks=pytest.mark.slow),
    ],
)
def test_offline(backend, command, tiny, tmp_path):
    """The line of the log names the backend that the command names: an example must not override it."""
    said = run(command, tiny, tmp_path)
    assert f"4 of 5 RMSNorm layers fused (backend {backend}, target trn2)" in said
    assert said.count("\n  ") >= 3  # an answer to each prompt


@pytest.mark.engine
def test_quantize(tiny, tmp_path):
    """ "with codes within ±240" """
    said = run(".venv/bin/vllm-neuron-rmsq quantize .cache/smollm2-bf16 smollm2-trn2", tiny, tmp_path)
    made = load(tmp_path / "smollm2-trn2")
    codes = [t for name, t in made.items() if f"{name}_scale" in made]
    assert len(codes) == 14
    assert max(t.float().abs().max() for t in codes) == 240
    assert "14 linears" in said


@pytest.mark.engine
def test_inspect(tiny, tmp_path):
    said = run(".venv/bin/vllm-neuron-rmsq inspect .cache/smollm2-fp8", tiny, tmp_path)
    assert "whole; 14 FP8 weights" in said


@pytest.mark.slow
def test_the_layer_level_test(tiny, tmp_path):
    assert re.search(
        r"\d+ passed", run(".venv/bin/python -m pytest examples/layer_level_test.py", tiny, tmp_path)
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_the_nki_kernels_would_cost(tiny, tmp_path):
    results = ROOT / "benchmarks/results/nki_cost.csv"
    before = results.read_bytes()
    try:
        said = run(".venv/bin/python benchmarks/nki_cost.py", tiny, tmp_path)
    finally:
        results.write_bytes(before)  # the history is of real runs
    assert "rms_norm_quant" in said
