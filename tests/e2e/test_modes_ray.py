"""The Ray executor over two Ray nodes, which are both on this machine.

vLLM's CPU platform names no Ray resource, so Ray is refused there. A platform plugin made on the spot names
one ("GPU", of which each node says to have one), and changes nothing else.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import modes
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
"""
ENTRY = "[vllm.platform_plugins]\nray_cpu = ray_cpu_entry:platform\n"


def write_platform(folder: Path) -> None:
    """A distribution whose entry point vLLM finds where ``folder`` is on ``PYTHONPATH``."""
    (folder / "ray_cpu.py").write_text(PLATFORM)
    (folder / "ray_cpu_entry.py").write_text('def platform():\n    return "ray_cpu.RayCpuPlatform"\n')
    info = folder / "ray_cpu-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY)


def wait_for(port: int) -> None:
    """Return when somebody listens there."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two Ray nodes; this process and what it starts find them and the platform."""
    pytest.importorskip("ray", reason="make test-slow installs it")
    folder = tmp_path_factory.mktemp("ray")
    write_platform(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        "--num-gpus",
        "1",
        "--num-cpus",
        "1",
    ]
    ray += ["--object-store-memory", str(100 << 20)]
    head = ["--head", "--port", str(port), "--include-dashboard", "false", "--node-ip-address", "127.0.0.1"]
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # for processes of multiprocessing's, which inherit it
        patch.setenv("PYTHONPATH", f"{folder}:{Path(modes.__file__).parent}")  # for Ray's
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send modes.report
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ADDRESS", address)
        patch.setenv("VLLM_CACHE_ROOT", str(folder / "vllm-cache"))
        try:
            # The second finds the first; vLLM waits until both say that they have a device.
            for arguments in (head, ["--address", address, "--node-ip-address", "127.0.0.1"]):
                with (folder / f"node{len(started)}.log").open("w") as log:
                    started.append(
                        subprocess.Popen(
                            ray + arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                        )
                    )
                wait_for(port)
            yield
        finally:
            for process in reversed(started):
                os.killpg(process.pid, 15)
                process.wait(60)


def run(checkpoint: Path, **arguments) -> tuple[list[str], modes.Answers]:
    """Return the start-up line of each rank, and the answers."""
    with modes.engine(checkpoint, **arguments) as llm:
        return llm.apply_model(modes.report), modes.answers(llm)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ray_nodes(arguments, tiny, nodes, prove):
    over_ray = run(tiny, distributed_executor_backend="ray", **arguments)
    lines, _ = over_ray
    assert len(lines) == 2 and all("(backend cpu, target trn2)" in line for line in lines)
    assert over_ray == run(tiny, **arguments)
    mode = next(iter(arguments)).removesuffix("_size").replace("_", " ")
    prove(f"Ray over two nodes, {mode} 2", "as without", "the bits of two ranks on one node")
