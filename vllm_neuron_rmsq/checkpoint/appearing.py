"""A folder that appears complete or not at all; what a killed run has left is gone on from.

While ``NAME`` is made there is ``.NAME.partial`` beside it::

    .NAME.partial/
        lock            held by the process that is at it
        job.json        what is being made of what; another job does not go on from here
        shards/         what is known of each finished shard
        SHARD           a shard being written
        checkpoint/     finished shards, in the end everything; renamed to NAME
        report.json     what is known of the whole, written before the last rename
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq.checkpoint.files import fsync, write_json

LOCK = "lock"
JOB = "job.json"
SHARDS = "shards"
CHECKPOINT = "checkpoint"
REPORT = "report.json"


class Partial:
    """What there is of a folder that is being made.

    Attributes:
        path: ``.NAME.partial``.
        checkpoint: what becomes ``NAME``.
        cleared: whether a killed run of another job had left something here, which was removed.
        report: what :meth:`complete` was told, where a run was killed after the folder had got its name.
    """

    def __init__(self, path: Path, cleared: bool, report: Any | None = None) -> None:
        self.path = path
        self.checkpoint = path / CHECKPOINT
        self.cleared = cleared
        self.report = report

    def finished(self, shard: str) -> Any | None:
        """Return what :meth:`finish` was told of a shard, or ``None`` if it is yet to be made."""
        return _read(self.path / SHARDS / f"{shard}.json") if (self.checkpoint / shard).is_file() else None

    def finish(self, shard: str, about: Any) -> None:
        """Count a shard, whose data are on the disk, among the finished ones; keep what is known of it."""
        _write(self.path / SHARDS / f"{shard}.json", about)
        (self.path / shard).rename(self.checkpoint / shard)

    def complete(self, about: Any) -> None:
        """Keep what is known of the whole."""
        _write(self.path / REPORT, about)


@contextlib.contextmanager
def appearing(out: Path, job: Any) -> Iterator[Partial]:
    """Yield a place for files that become ``out`` if the block ends well, and are removed otherwise.

    Args:
        out: the folder to make.
        job: what it is made of and how, as JSON. What a killed run of the same job has finished is there.

    Raises:
        ValueError: ``out`` exists, cannot be made there, or another process is at it; or the disk is full.
    """
    path = out.parent / f".{out.name}.partial"
    with _errors_of(out), contextlib.ExitStack() as cleanup:
        # A run may be killed after the folder has got its name and before its own remains are gone.
        complete = os.path.lexists(out) and (path / LOCK).is_file() and not (path / CHECKPOINT).exists()
        if not complete:
            _refuse_existing(out)
        _lock(path, out, cleanup)
        report = _read(path / REPORT) if complete and _read(path / JOB) == job else None
        if report is None:
            _refuse_existing(out)
        else:
            yield Partial(path, False, report)
            return
        cleared = _begin(path, job)
        yield Partial(path, cleared)
        _publish(path, out)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        what = f", a link to {os.readlink(out)}" if out.is_symlink() else ""
        raise ValueError(f"{out}: exists already{what}; choose another name or delete it first")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: {out.parent} is not a directory; make it first")


def _lock(path: Path, out: Path, cleanup: contextlib.ExitStack) -> None:
    """Make ``.NAME.partial`` if it is not there, and hold it until it is removed."""
    lock = path / LOCK
    if os.path.lexists(path) and not lock.is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is in the way and was not made by this tool; move it elsewhere")
    path.mkdir(exist_ok=True)
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    cleanup.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.exists(lock) and os.path.samestat(os.fstat(file), os.stat(lock))
    except BlockingIOError:
        mine = False
    if not mine:  # held, or just removed, by another process
        raise ValueError(
            f"{out}: another process is making it, in {path}; wait for it or choose another name"
        )
    cleanup.callback(_remove, path)


def _begin(path: Path, job: Any) -> bool:
    """Make ready for a job; return whether something of another one had to be removed."""
    if _read(path / JOB) == job:
        return False
    left = _clear(path)
    (path / SHARDS).mkdir()
    (path / CHECKPOINT).mkdir()
    _write(path / JOB, job)
    return left


def _clear(path: Path) -> bool:
    """Remove all but the lock; return whether there was something."""
    left = [child for child in path.iterdir() if child.name != LOCK]
    for child in left:
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
    return bool(left)


def _remove(path: Path) -> None:
    """Remove it all, the lock, which tells that it is ours, at last."""
    with contextlib.suppress(OSError):
        _clear(path)
        (path / LOCK).unlink()
        path.rmdir()


def _publish(path: Path, out: Path) -> None:
    """Put on the disk what is complete, then give it its name."""
    checkpoint = path / CHECKPOINT
    for folder, _, names in os.walk(checkpoint, topdown=False):
        for name in names:
            fsync(Path(folder) / name)
        fsync(Path(folder))
    if os.path.lexists(out):  # made meanwhile by somebody else
        _refuse_existing(out)
    checkpoint.rename(out)
    fsync(out.parent)


def _read(path: Path) -> Any | None:
    """Return what :func:`_write` wrote, or ``None``."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, content: Any) -> None:
    """Write JSON so that it is there as a whole or not at all, and on the disk."""
    draft = path.with_name(path.name + ".draft")
    write_json(draft, content)
    fsync(draft)
    draft.rename(path)
    fsync(path.parent)


@contextlib.contextmanager
def _errors_of(out: Path) -> Iterator[None]:
    """Say in one sentence why a folder cannot be made."""
    try:
        yield
    except OSError as error:
        remedy = "choose another place"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "nothing of it is left; make room or choose another disk"
        elif error.errno == errno.ENAMETOOLONG:
            remedy = f"while it is made, .{out.name}.partial is beside it; choose a shorter name"
        raise ValueError(f"{out}: cannot be made ({error.strerror}); {remedy}") from error
