"""A checkpoint as Hugging Face lays it out: config.json, and one safetensors file or several and an index."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq.checkpoint.files import (
    FileTensor,
    check_whole,
    kind,
    read_header,
    read_json,
    unreadable,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
)
"""What holds weights, in this format or another, and is not copied."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SOURCE = "a checkpoint directory or a .gguf file"


@dataclass(frozen=True)
class Survey:
    """The safetensors files of a checkpoint.

    Attributes:
        shards: the tensors of every file that has a sound header, by the file's name.
        problems: why the checkpoint is not whole, a sentence each; none where it is.
    """

    shards: dict[str, dict[str, FileTensor]]
    problems: list[str]


def require(source: Path, expected: str = SOURCE) -> None:
    """Refuse a path that is no folder and no file.

    Args:
        source: the path.
        expected: what it should be, for the message.

    Raises:
        ValueError: it is not there, cannot be reached, or is a FIFO, a socket or a device.
    """
    try:
        mode = source.stat().st_mode
    except FileNotFoundError as error:
        if source.is_symlink():
            raise unreadable(source, error) from error
        what = f"{source}: is not there; expected {expected}"
        if HUB_ID.fullmatch(str(source)) and not source.parent.exists():
            what += (
                f". If it is a model on the Hugging Face Hub, download it first: "
                f"hf download {source} --local-dir {source.name}"
            )
        raise ValueError(what) from error
    except OSError as error:
        raise unreadable(source, error) from error
    if kind(mode) not in ("a directory", "a file"):
        raise ValueError(f"{source}: expected {expected}, got {kind(mode)}")


def read_config(source: Path) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        ValueError: it is not there, or no JSON object.
    """
    path = source / "config.json"
    if not os.path.lexists(path):
        raise ValueError(f"{source}: has no config.json; expected a Hugging Face checkpoint directory")
    return read_json(path)


def survey(source: Path) -> Survey:
    """Read the headers of every safetensors file of a checkpoint and compare them with its index.

    Raises:
        ValueError: there are no such files, or the index is no index.
    """
    index = source / INDEX
    if os.path.lexists(index):
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
    elif os.path.lexists(source / WEIGHTS):
        weight_map, names = {}, [WEIGHTS]
    else:
        raise ValueError(
            f"{source}: has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints can be read"
        )
    shards, problems = {}, []
    for name in names:
        path = source / name
        if not os.path.lexists(path):
            problems.append(f"{path}: is not there though {INDEX} names it")
            continue
        try:
            header = read_header(path)
            shards[name] = header.tensors
            check_whole(path, header)
        except ValueError as error:
            problems.append(str(error))
    if len(shards) == len(names):
        found = {name for tensors in shards.values() for name in tensors}
        missing = sorted(set(weight_map) - found)
        if missing:
            problems.append(f"{source}: {INDEX} names tensors that are in no file: {some(missing)}")
    return Survey(shards, problems)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; download the checkpoint again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{index}: expected the name of a file beside it for {tensor}, got {name!r}; "
                "download the checkpoint again"
            )
    return weight_map


def identity(source: Path) -> dict[str, Any]:
    """Return what tells a checkpoint, or a file, from others: its place, and size and time of every file."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    stats = {path.name: path.stat() for path in files if path.is_file()}
    return {
        "source": str(source.resolve()),
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
    }


def others(source: Path) -> list[Path]:
    """Return the files to keep beside the weights, as paths within ``source``: tokenizer, licence, code, ...

    Hidden files and folders (``.git``, ``.cache``) are none of them.
    """

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error)

    found = []
    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(folder).relative_to(source)
        found += [
            within / name
            for name in sorted(names)
            if not name.startswith(".") and not name.endswith(WEIGHT_SUFFIXES)
        ]
    return [path for path in found if path != Path("config.json")]


def some(names: list[str]) -> str:
    """Name the first three of them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
