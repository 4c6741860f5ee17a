"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

The kernels use torch's stable C++ interface: headers of any torch >= 2.11 build a library that every such
torch loads. torch is not a build requirement, so that installing this package never replaces the torch
that vLLM came with: its headers are looked for in the environment installed into. Without them, without a
compiler, or when compiling fails, the package installs all the same, and
``vllm_neuron_rmsq/_cpu_kernels.txt`` says why, where ``backends/cpu.py`` reads it.
"""

import os
import platform
import re
import runpy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup

MINIMUM_SETUPTOOLS = 77
"""The first that knows what pyproject.toml says: an older one ends in pages about it."""

if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
    sys.exit(
        f"error: setuptools >= {MINIMUM_SETUPTOOLS} is needed to build vllm-neuron-rmsq, this is "
        f"{setuptools.__version__}: pip install -U setuptools"
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402 - older ones have none
from setuptools.command.build_ext import build_ext  # noqa: E402

SOURCES = Path("vllm_neuron_rmsq/kernels/cpu")
KERNELS = ("rms_norm_quant.cpp", "packed_fp8_linear.cpp", "silu_mul_quant.cpp")
"""Compiled once for each instruction-set level; the other sources once."""

FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
"""Multiply-adds are written out where they are meant (contract=off), so that every level computes the same
bits. The warnings switched off are about GCC's own AVX-512 header."""

LEVELS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    LEVELS["avx512_bf16"] = [*LEVELS["avx512"], "-mavx512bf16", "-mavx512vbmi"]

MINIMUM_TORCH = (2, 11)
TORCH_TARGET = ("TORCH_TARGET_VERSION", "0x020b000000000000")
"""The stable interface as of that version (torch/csrc/stable/version.h)."""

FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


class NotBuilt(Exception):
    """The kernels cannot be built here; the message says why."""


def find_torch() -> Path:
    """Return the folder of the torch installed beside this interpreter, without importing it.

    A fresh interpreter that ignores PYTHONPATH looks for it: pip's build isolation hides the environment
    being installed into from this one through that variable.
    """
    found = subprocess.run(
        [sys.executable, "-E", "-c", FIND_TORCH], capture_output=True, text=True
    ).stdout.strip()
    if not found:
        raise NotBuilt(
            "torch was not found by the build; install torch first, then this package with "
            "pip install --no-build-isolation"
        )
    torch = Path(found).parent
    version = torch / "include/torch/headeronly/version.h"
    numbers = (
        re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", version.read_text())
        if version.exists()
        else []
    )
    if tuple(map(int, numbers)) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise NotBuilt(f"torch >= {minimum} with its C++ headers is needed, and is not in {torch}")
    return torch


def run(command, **_):
    """Run the compiler or linker; raises its first error, where setuptools' own function raises a number.

    In English, whatever the user's language: the word is looked for.
    """
    english = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", env=english)
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if re.search(r"\berror:", line)] or said[-1:]
        raise NotBuilt(errors[0] if errors else f"{command[0]!r} failed with exit code {done.returncode}")


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        reason = library.with_suffix(".txt")
        for stale in (library, reason):
            stale.unlink(missing_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._compile_and_link(library)
        except Exception as error:  # whatever it was, the package works without
            text = textwrap.shorten(str(error), 200)
            self.warn(f"native CPU kernels not built: {text}")
            reason.write_text(f"{text}\n")

    def _compile_and_link(self, library):
        if sys.platform != "linux":
            raise NotBuilt(f"they are built on Linux only, not on {sys.platform}")
        torch = find_torch()
        self.compiler.spawn = self.compiler.call = run  # setuptools 84 calls the latter
        digest = runpy.run_path(str(SOURCES / "digest.py"))
        common = [TORCH_TARGET, ("RMSQ_SOURCES", f'"{digest["MARK"]}{digest["digest"]()}"')]
        jobs: list[tuple[Path, str, list[str], list[tuple[str, str]], list[str]]] = []
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name in KERNELS:
                jobs += [(source, level, flags, [("RMSQ_ISA", level)], []) for level, flags in LEVELS.items()]
            else:
                jobs.append((source, "common", [], common, [str(torch / "include")]))

        def compile_one(source, folder, flags, macros, include):
            return self.compiler.compile(
                [str(source)],
                output_dir=os.path.join(self.build_temp, folder),
                macros=macros,
                include_dirs=include,
                extra_postargs=[*FLAGS, *flags],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(lambda job: compile_one(*job), jobs) for name in names]
        # torch's libraries are in the process before this one is loaded: named for the linker, no run path.
        self.compiler.link_shared_object(
            objects,
            str(library),
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            target_lang="c++",
        )

    def copy_extensions_to_source(self):
        """In an editable install the library, or the reason why there is none, goes beside the sources."""
        for ext in self.extensions:
            inplace, built = map(
                Path, self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            )
            for suffix in (".so", ".txt"):
                inplace.with_suffix(suffix).unlink(missing_ok=True)
                if built.with_suffix(suffix).exists():
                    self.copy_file(str(built.with_suffix(suffix)), str(inplace.with_suffix(suffix)))


class Wheel(bdist_wheel):
    def get_tag(self):
        """The library needs torch's stable interface and nothing of Python's: one wheel for every version.

        Without the library there is nothing of a machine in the wheel, and it may be installed on any.
        """
        library = Path(
            self.get_finalized_command("build_ext").get_ext_fullpath("vllm_neuron_rmsq._cpu_kernels")
        )
        built = library.exists()
        self.root_is_pure = not built
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    ext_modules=[Extension("vllm_neuron_rmsq._cpu_kernels", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
