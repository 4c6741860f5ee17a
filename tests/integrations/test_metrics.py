"""Metrics: what workers write is in the registry of the process that serves ``/metrics``."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_neuron_rmsq.backends import Counts
from vllm_neuron_rmsq.integrations import metrics

LABELS = {"model_name": "m", "engine": "0", "rank": "1"}
GAUGES = [metrics.Gauge("norms", 60, {"state": "fused"}), metrics.Gauge("halved_linears", 2)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A temporary directory for metrics' own, and no other trace of this process's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics, "_folder", None)
    monkeypatch.setattr(metrics, "_writers", {})
    monkeypatch.setattr(metrics.atexit, "register", lambda *_: None)
    for variable in (metrics.FOLDER, metrics.SHARED):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def registry(monkeypatch):
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    return registry


def shown(registry) -> list[str]:
    text = prometheus_client.generate_latest(registry).decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_what_a_worker_writes_is_shown(folders, registry):
    metrics.collect()
    metrics.publish(LABELS, GAUGES, lambda: Counts(17, 1))
    common = 'engine="0",model_name="m",rank="1"'
    assert sorted(shown(registry)) == [
        f"vllm:rmsq_halved_linears{{{common}}} 2.0",
        f"vllm:rmsq_invalid_rows_total{{{common}}} 1.0",
        f'vllm:rmsq_norms{{{common},state="fused"}} 60.0',
        f"vllm:rmsq_packed_rows_total{{{common}}} 17.0",
    ]
    text = prometheus_client.generate_latest(registry).decode()
    assert "# TYPE vllm:rmsq_norms gauge" in text
    assert "# TYPE vllm:rmsq_packed_rows_total counter" in text


def test_counters_go_on(folders, registry, monkeypatch):
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN", 0.01)
    metrics.collect()
    rows = iter(range(10**9))
    metrics.publish(LABELS, [], lambda: Counts(next(rows), 0))
    line = 'vllm:rmsq_packed_rows_total{engine="0",model_name="m",rank="1"} '
    deadline = time.monotonic() + 30
    while not any(x.startswith(line) and float(x.removeprefix(line)) > 3 for x in shown(registry)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_models_of_a_process_share_no_rows(folders, registry):
    """A draft model: rows are counted by the process, and shown once."""

    def counts():
        return Counts(5, 0)

    metrics.collect()
    metrics.publish(LABELS, GAUGES, counts)
    metrics.publish(LABELS | {"model_name": "draft"}, GAUGES, counts)
    names = [line.partition("{")[0] for line in shown(registry)]
    assert names.count("vllm:rmsq_norms") == 2
    assert names.count("vllm:rmsq_packed_rows_total") == 1


def test_with_several_api_servers_files_go_where_vllm_has_its_own(folders, monkeypatch, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv(metrics.SHARED, str(shared))
    metrics.collect()
    metrics.publish(LABELS, GAUGES, None)
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry, str(shared))
    assert len(shown(registry)) == len(GAUGES)
    assert [path.name for path in folders.iterdir()] == ["shared"]


def test_a_full_disk_costs_the_metrics_and_nothing_else(folders, registry, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics.collect()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level("WARNING", metrics.logger.name):
        metrics.publish(LABELS, GAUGES, None)
    assert "/metrics says nothing of vllm-neuron-rmsq in this worker: [Errno 28]" in caplog.text
    assert shown(registry) == []
    assert list(Path(os.environ[metrics.FOLDER]).iterdir()) == []  # the directory of the metrics


def test_what_a_killed_server_left_is_removed_by_the_next(folders, registry):
    old = time.time() - 2 * metrics.SECONDS_TO_LOCK
    left, used, new = (folders / f"{metrics.PREFIX}{name}" for name in ("left", "used", "new"))
    for folder in (left, used, new):
        folder.mkdir()
        (folder / "counter_rmsq-1.db").touch()
    for folder in (left, used):
        os.utime(folder, (old, old))
    handle = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        metrics.collect()
        metrics.publish(LABELS, GAUGES, None)
    finally:
        os.close(handle)
    assert sorted(folders.iterdir()) == sorted([used, new, Path(os.environ[metrics.FOLDER])])


def test_a_process_that_starts_no_worker_leaves_nothing(folders, registry):
    metrics.collect()
    assert shown(registry) == []
    assert list(folders.iterdir()) == []


PROGRAM = """
import multiprocessing, os, sys
from vllm_neuron_rmsq.integrations import metrics

def worker(folder):
    metrics.collect()
    assert os.environ[metrics.FOLDER] == folder
    metrics.publish({"rank": "0"}, [metrics.Gauge("norms", 3)], None)

if __name__ == "__main__":
    import prometheus_client
    metrics.collect()
    folder = os.environ[metrics.FOLDER]
    child = multiprocessing.get_context(sys.argv[1]).Process(target=worker, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert 'vllm:rmsq_norms{rank="0"} 3.0' in prometheus_client.generate_latest().decode()
    print(folder)
"""


@pytest.mark.engine
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_inherit_the_directory_and_it_is_removed_at_the_end(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # A server started from a Python program that has loaded the plugin itself has a directory of its own.
    environment = os.environ | {metrics.FOLDER: "/somebody-else's", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, program, method], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    assert not folder.exists()
