"""A conversion killed at any moment leaves no checkpoint that loads and is wrong, and can be gone on from."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_llama

from vllm_neuron_rmsq.checkpoint import convert

PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from vllm_neuron_rmsq.checkpoint import convert

moment, lock, events = int(sys.argv[3]), threading.Lock(), []

def counted(name):
    original = getattr(os, name)
    def function(*arguments, **options):
        with lock:
            events.append(name)
            if len(events) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(os, name, function)

for name in ("pwrite", "truncate", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir"):
    counted(name)
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(*events)
"""
"""Converts, and kills itself right before the so-manieth call that changes something on the disk."""


def run(source: Path, out: Path, moment: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(source), str(out), str(moment)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A source, what is to become of it, and the calls that change the disk, in their order."""
    folder = tmp_path_factory.mktemp("kills")
    source = write_llama(folder / "bf16", shards=3)
    done = run(source, folder / "whole", 0)
    assert done.returncode == 0, done.stderr
    return source, content(folder / "whole"), done.stdout.split()


def moments(events: list[str], anywhere: int, at_the_end: int) -> list[int]:
    """Some moments anywhere, some in the last phase: what comes after the last byte of a weight."""
    last = len(events) - events[::-1].index("pwrite") + 1
    chance = random.Random(0)
    return [chance.randint(1, last - 1) for _ in range(anywhere)] + [
        chance.randint(last, len(events)) for _ in range(at_the_end)
    ]


def killed_and_gone_on(case, tmp_path: Path, moment: int) -> None:
    source, whole, events = case
    out = tmp_path / f"fp8-{moment}"
    assert run(source, out, moment).returncode == -signal.SIGKILL
    assert not out.exists() or content(out) == whole, events[moment - 1]
    was_complete = out.exists()
    try:
        assert len(convert(source, out).layers) == 14
    except ValueError as error:
        assert was_complete and "exists already" in str(error)
    assert content(out) == whole, events[moment - 1]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    for path in list(out.iterdir()):
        path.unlink()
    out.rmdir()


@pytest.mark.engine
def test_killed_at_three_moments(case, tmp_path):
    for moment in moments(case[2], 1, 2):
        killed_and_gone_on(case, tmp_path, moment)


@pytest.mark.slow
def test_killed_at_twenty_moments(case, tmp_path):
    for moment in moments(case[2], 15, 5):
        killed_and_gone_on(case, tmp_path, moment)


KILLED_AT_THE_LAST_TENSOR = """
import os, signal, sys, time
from pathlib import Path
from vllm_neuron_rmsq.checkpoint import convert

source, out = map(Path, sys.argv[1:])

def tell(done, total, what):
    if done == total:  # the last shard is yet to be finished; the disk may be slow with those before
        while not list(out.parent.glob(".*.partial/checkpoint/*.safetensors")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

convert(source, out, progress=tell)
"""


@pytest.mark.engine
def test_finished_shards_are_not_made_again(case, tmp_path):
    source, whole, _ = case
    out = tmp_path / "fp8"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_LAST_TENSOR, str(source), str(out)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    finished = list((tmp_path / ".fp8.partial" / "checkpoint").glob("*.safetensors"))
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    assert times
    report = convert(source, out)
    assert report.resumed == len(times)
    assert len(report.layers) == 14
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert content(out) == whole


def test_what_another_job_has_left_is_removed(case, tmp_path):
    source, _, events = case
    run(source, tmp_path / "fp8", len(events) // 2)
    assert (tmp_path / ".fp8.partial").is_dir()
    report = convert(source, tmp_path / "fp8", "trn3")
    assert report.cleared and not report.resumed
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_leaves_nothing(case, tmp_path, number):
    """Sent by another process when the first shards are there."""
    program = (
        "import time; from vllm_neuron_rmsq.checkpoint import stream; original = stream.Worker.carry_out\n"
        "def slow(*arguments): time.sleep(0.2); return original(*arguments)\n"
        "stream.Worker.carry_out = slow\n"
        "from vllm_neuron_rmsq.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "quantize", str(case[0]), str(tmp_path / "fp8")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".fp8.partial/*.safetensors")):
        assert process.poll() is None, process.communicate()
        os.sched_yield()
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert list(tmp_path.iterdir()) == []
