"""What a server's ``/metrics`` says of the plugin: from every rank's process into vLLM's registry.

The layers are in worker processes, ``/metrics`` is in the API server's. Between them are files in the format
of ``prometheus_client``'s multiprocess mode, one pair for each worker, which it reads at each scrape:

- with several API servers vLLM itself uses that mode, and the files go where its own are
  (``PROMETHEUS_MULTIPROC_DIR``);
- with one API server, or offline (``llm.get_metrics()``), vLLM's metrics are in the process's registry. Then
  the first process that loads the plugin names a temporary directory, which the others inherit through the
  environment, and registers a collector of it. The first worker makes it. It is removed when the process that
  named it ends; one that was left by a killed process is removed by the next.

Nothing here may keep a server from serving: what goes wrong is logged, and there are no metrics.
Ranks on another machine than the API server are not seen.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import multiprocessing
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.backends import Counts

logger = logging.getLogger(f"vllm.{__name__}")

FOLDER = settings.METRICS_FOLDER
SHARED = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "rmsq-metrics-"
FILE_BYTES = 1 << 16
SECONDS_BETWEEN = 1.0
"""Between two looks at the counters."""
SECONDS_TO_LOCK = 60
"""A directory younger than that may be about to be locked."""

HELP = {
    "info": "What the plugin computes with; the value is 1.",
    "norms": "RMSNorm layers by what became of them: fused with their quantization, or vLLM's own.",
    "activations": "SiluAndMul layers by what became of them: fused with their quantization, or vLLM's own.",
    "linears": "Linears that multiply packed FP8 rows, by scheme.",
    "halved_linears": "Linears of these whose weight had codes beyond the target's range and was halved.",
    "packed_rows": "Rows that were quantized to FP8 codes and a scale.",
    "invalid_rows": "Rows of these that held NaN or Inf, or exceeded fp32's range.",
}
"""Every metric, named ``vllm:rmsq_<key>``; the last two are counters, the others gauges."""


class Gauge(NamedTuple):
    """One number about a loaded model.

    Attributes:
        name: a key of ``HELP``.
        value: the number.
        labels: besides those that every metric has (``model_name``, ``engine``, ``rank``).
    """

    name: str
    value: float
    labels: dict[str, str] = {}  # noqa: RUF012  # never changed


def collect() -> None:
    """Let this process's registry show what the workers that it starts will write, once."""
    global _folder
    # A process that somebody else's Python program started must not take that one's for its own.
    worker = multiprocessing.parent_process() is not None or "RAY_RAYLET_PID" in os.environ
    if worker or _folder or os.environ.get(SHARED):
        return
    try:
        from prometheus_client import REGISTRY

        _remove_left()
        # Its name only: many a process loads the plugin and starts no worker. The first worker makes it.
        _folder = os.environ[FOLDER] = str(Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}")
        REGISTRY.register(_Collector(_folder))
        atexit.register(_remove, _folder, os.getpid())
    except (ImportError, OSError, ValueError) as error:
        logger.warning("/metrics says nothing of vllm-neuron-rmsq: %s", error)


_folder: str | None = None


class _Collector:
    """Reads what is in a directory at each scrape, once there is one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def collect(self) -> Iterable[Any]:
        from prometheus_client.multiprocess import MultiProcessCollector

        return MultiProcessCollector(None, self.folder).collect() if os.path.isdir(self.folder) else []


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left() -> None:
    """Remove what killed servers left: directories on which no worker keeps a lock."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Locked, another user's, or removed by another server at this moment.
        with contextlib.suppress(OSError), _opened(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - left.stat().st_mtime > SECONDS_TO_LOCK:
                shutil.rmtree(left)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def publish(labels: dict[str, str], gauges: Iterable[Gauge], counts: Callable[[], Counts] | None) -> None:
    """Write what a worker has loaded, and from now on what it counts.

    Args:
        labels: of every metric: ``model_name``, ``engine`` and ``rank``, as vLLM has them.
        gauges: what there is to say of the model.
        counts: tells rows quantized in this process, and invalid ones; ``None`` where nobody counts.
    """
    folder = os.environ.get(SHARED) or os.environ.get(FOLDER)
    if not folder:
        return
    try:
        writer = _writer(folder)
        for gauge in gauges:
            writer.gauge(gauge.name, labels | gauge.labels, gauge.value)
        if counts is not None:
            writer.count(labels, counts)
    except (ImportError, OSError) as error:  # the disk is full, the directory is gone
        logger.warning("/metrics says nothing of vllm-neuron-rmsq in this worker: %s", error)


_writers: dict[tuple[int, str], _Writer] = {}


def _writer(folder: str) -> _Writer:
    """The process's writer: a forked process has its own."""
    key = (os.getpid(), folder)
    if key not in _writers:
        _writers[key] = _Writer(Path(folder))
    return _writers[key]


class _Writer:
    """The two files of a process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(0o700, exist_ok=True)
        self._lock_of_folder = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._lock_of_folder, fcntl.LOCK_SH)
        name = f"rmsq-{os.getpid()}"
        self._gauges = _file(folder / f"gauge_mostrecent_{name}.db")
        self._counters = _file(folder / f"counter_{name}.db")
        self._counting: list[tuple[dict[str, str], Callable[[], Counts]]] = []
        self._lock = threading.Lock()

    def gauge(self, name: str, labels: dict[str, str], value: float) -> None:
        with self._lock:
            self._gauges.write_value(_key(name, "", labels), float(value), 1.0)

    def count(self, labels: dict[str, str], counts: Callable[[], Counts]) -> None:
        """Write the counters now and every second from now on. They are the process's: where it has loaded
        several models (a draft model is the second), the first has them."""
        if counts in (counting for _, counting in self._counting):
            return
        self._counting.append((labels, counts))
        self._count()
        if len(self._counting) == 1:
            threading.Thread(target=self._keep_counting, name="rmsq-metrics", daemon=True).start()

    def _keep_counting(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN)
            self._count()

    def _count(self) -> None:
        with self._lock:
            for labels, counts in self._counting:
                for name, value in zip(("packed_rows", "invalid_rows"), counts(), strict=True):
                    self._counters.write_value(_key(name, "_total", labels), float(value), 0.0)


def _file(path: Path) -> Any:
    """Open a file of numbers. All of it is claimed now: writing to a mapped file on a full disk is a signal
    that ends the process."""
    from prometheus_client.mmap_dict import MmapedDict

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(handle, 0, FILE_BYTES)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)
    return MmapedDict(str(path))


def _key(name: str, suffix: str, labels: dict[str, str]) -> str:
    from prometheus_client.mmap_dict import mmap_key

    metric = f"vllm:rmsq_{name}"
    return mmap_key(metric, metric + suffix, list(labels), list(labels.values()), HELP[name])
