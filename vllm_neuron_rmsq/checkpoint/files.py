"""What lies on the disk: safetensors files, read and written a block at a time.

A safetensors file is 8 bytes (little endian) that count the bytes of a JSON header, the header, which gives
each tensor's dtype, shape and place, and the data. The library ``safetensors`` maps a file as a whole and
wants all of it in memory to write one, and it refuses a file that is cut short. Here memory is bounded
whatever the file's size, and what is missing can be said.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of an element, by safetensors' name of the dtype. Of others nothing but the bytes is looked at."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The dtypes that are computed with."""

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

HEADER_LIMIT = 100_000_000
"""The library's own limit for a header."""


class Tensor(Protocol):
    """A tensor that is read a block at a time, wherever it is.

    Attributes:
        name: its name in the checkpoint.
        dtype: safetensors' name of its dtype.
        shape: its shape.
        nbytes: bytes of its data.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def blocks(self, block: Block, size: int) -> Iterator[int]:
        """Fill ``block`` with ``size`` bytes after another (the last time fewer); yield how many."""
        ...


class Block:
    """Memory for a part of a tensor, as bytes and as a torch tensor.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(max(size, 1))  # torch wants a byte
        self.memory = memoryview(self._bytes)
        self.tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)

    def rows(self, size: int, dtype: str, width: int) -> torch.Tensor:
        """Return the first ``size`` bytes as ``[rows, width]`` of ``dtype``."""
        return self.tensor[:size].view(TORCH_DTYPES[dtype]).view(-1, width)


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file; see :class:`Tensor`.

    Attributes:
        path: the file.
        offset: where its data begin in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int

    def blocks(self, block: Block, size: int) -> Iterator[int]:
        with opened(self.path) as file:
            for start in range(0, self.nbytes, size):
                part = min(size, self.nbytes - start)
                read_exactly(file, block.memory[:part], self.offset + start, self.path)
                yield part


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory; see :class:`Tensor`."""

    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def blocks(self, block: Block, size: int) -> Iterator[int]:
        flat = self.tensor.contiguous().view(-1).view(torch.uint8)
        for part in flat.split(size):
            block.tensor[: part.numel()].copy_(part)
            yield part.numel()


def load(tensor: Tensor) -> torch.Tensor:
    """Return a small tensor, a scale say, as a whole in its own dtype.

    Raises:
        ValueError: it cannot be read, or has a dtype that is not computed with.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise ValueError(
            f"{tensor.name}: has dtype {tensor.dtype}; expected one of {', '.join(TORCH_DTYPES)}"
        )
    block = Block(tensor.nbytes)
    for _ in tensor.blocks(block, max(tensor.nbytes, 1)):
        pass
    return block.tensor[: tensor.nbytes].view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading; yield its descriptor.

    Raises:
        ValueError: it is not there, no file, or cannot be read.
    """
    try:
        mode = path.stat().st_mode  # before it is opened: that waits for ever on a FIFO
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: expected a file, got {kind(mode)}")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        yield file
    finally:
        os.close(file)


def kind(mode: int) -> str:
    """Say in words what ``st_mode`` tells that something is."""
    for is_one, words in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    ):
        if is_one(mode):
            return words
    return "a device"


def unreadable(path: Path, error: OSError) -> ValueError:
    """Return the error to raise when ``path`` cannot be read, which does not mean that it is damaged."""
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return ValueError(f"{path}: is a link to {os.readlink(path)}, which is not there")
        return ValueError(f"{path}: is not there")
    return ValueError(f"{path}: cannot be read ({error.strerror})")


def read_exactly(file: int, memory: memoryview, offset: int, path: Path) -> None:
    """Fill ``memory`` from ``offset`` of an open file on.

    Raises:
        ValueError: it cannot be read, or ends before.
    """
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file, [memory[done:]], offset + done)
        except OSError as error:
            raise unreadable(path, error) from error
        if not count:
            raise ValueError(f"{path}: ends at byte {offset + done}; is somebody writing it?")
        done += count


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    with opened(path) as file:
        content = bytearray(os.fstat(file).st_size)
        read_exactly(file, memoryview(content), 0, path)
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    Attributes:
        tensors: every tensor by name, in the order of their data.
        end: where the data end by the header; the size that the file should have.
    """

    tensors: dict[str, FileTensor]
    end: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; its data may be cut short.

    Raises:
        ValueError: the file cannot be read, or its header is damaged.
    """
    with opened(path) as file:
        size = os.fstat(file).st_size
        if size < 8:
            raise _damaged(path, f"{size} bytes")
        first = bytearray(8)
        read_exactly(file, memoryview(first), 0, path)
        length = int.from_bytes(first, "little")
        if length > min(size - 8, HEADER_LIMIT):
            raise _damaged(path, "no header of safetensors")
        content = bytearray(length)
        read_exactly(file, memoryview(content), 8, path)
    begin = 8 + length
    try:
        described = json.loads(content.decode("utf-8"))
        described.pop("__metadata__", None)
        tensors = [
            FileTensor(name, about["dtype"], tuple(about["shape"]), stop - start, path, begin + start)
            for name, about in described.items()
            for start, stop in [about["data_offsets"]]
        ]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        end = begin
        for tensor in tensors:
            elements = math.prod(tensor.shape)
            bits = BITS.get(tensor.dtype)
            if tensor.offset != end or (bits is not None and tensor.nbytes * 8 != elements * bits):
                raise _damaged(path, f"the header gives {tensor.name} a place that cannot be")
            end += tensor.nbytes
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, "a header that is no description of tensors") from error
    return Header({tensor.name: tensor for tensor in tensors}, end)


def check_whole(path: Path, header: Header) -> None:
    """Raise ValueError unless a file is as long as its header says."""
    size = path.stat().st_size
    if size != header.end:
        raise _damaged(path, f"{size} bytes, should have {header.end}")


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"{path}: is damaged or truncated ({how}); download it again")


class Described(NamedTuple):
    """A tensor that is to be written: name, safetensors' name of the dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Writer:
    """A safetensors file whose tensors are written in any order, by several threads.

    Args:
        path: the file to make.
        tensors: what is to be in it.

    Attributes:
        unflushed: about how many bytes were written since it was last set to 0.
    """

    def __init__(self, path: Path, tensors: Iterable[Described]) -> None:
        # Data of wide elements first, so that all are aligned: what the format asks of a writer.
        ordered = sorted(tensors, key=lambda tensor: -BITS.get(tensor.dtype, 8))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets = {}
        end = 0
        for tensor in ordered:
            place = [end, end + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
            offsets[tensor.name] = end
            end += tensor.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        begin = 8 + len(encoded)
        self._offsets = {name: begin + offset for name, offset in offsets.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.unflushed = 0
        self._closed = False
        self._write(memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
        os.truncate(self._file, begin + end)

    def write(self, name: str, content: memoryview, start: int = 0) -> None:
        """Write a part of a tensor's data, from byte ``start`` of the tensor on."""
        self._write(content, self._offsets[name] + start)

    def _write(self, content: memoryview, offset: int) -> None:
        self.unflushed += len(content)
        while content:
            written = os.pwrite(self._file, content, offset)
            content, offset = content[written:], offset + written

    def flush(self) -> None:
        """Put on the disk what has been written so far."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file, if it is open; nothing more can be written."""
        if not self._closed:
            self._closed = True
            os.close(self._file)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    """Put a file, or the names in a directory, on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
