"""Carries out the steps of a plan, a block of rows at a time.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.checkpoint.files import TORCH_DTYPES, Block, FileTensor, Tensor, Writer, load
from vllm_neuron_rmsq.checkpoint.plan import FLOATS, Copy, Quantize, Refit, Step
from vllm_neuron_rmsq.packed import NAN_CODE
from vllm_neuron_rmsq.target import TRN3, Target

BLOCK_ELEMENTS = 1 << 18
"""Elements of a weight at a time: what is computed of them stays within a core's second-level cache."""

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, what)``: tensors, and the one just done."""


@dataclass(frozen=True)
class Layer:
    """What became of a linear.

    Attributes:
        name: of the linear.
        shape: ``[N, H]``.
        error: root mean square of the difference between the new and the old weight, over the old one's.
        halved: whether an FP8 weight had codes beyond the target's range.
    """

    name: str
    shape: tuple[int, int]
    error: float
    halved: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Layer:
        """Undo :meth:`as_dict`."""
        return cls(**content | {"shape": tuple(content["shape"])})


class Stopped(Exception):
    """The run is over: another thread has failed, or the user has had enough."""


@contextlib.contextmanager
def every_core() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Yield threads, one a core, on each of which torch uses that core alone; and what to set to stop them.

    They are stopped when the block ends, however it does.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    stop = threading.Event()
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class Reader:
    """Reads tensors some rows at a time, in one thread.

    Args:
        stop: set when the run is over.
    """

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.block = Block(BLOCK_ELEMENTS * 2)

    def values(self, tensor: Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row's number and the values, fp32, of some rows each."""
        rows, width = tensor.shape
        element = tensor.nbytes // max(rows * width, 1)
        row = 0
        for part in self.parts(tensor, _rows_at_a_time(width) * width * element):
            values = self.block.rows(part, tensor.dtype, width).to(torch.float32, copy=True)
            yield row, values
            row += values.shape[0]

    def codes(self, tensor: Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row's number and the codes, uint8, of some rows each, through all experts."""
        width = tensor.shape[-1]
        row = 0
        for part in self.parts(tensor, _rows_at_a_time(width) * width):
            codes = self.block.tensor[:part].view(-1, width)
            yield row, codes
            row += codes.shape[0]

    def parts(self, tensor: Tensor, size: int) -> Iterator[int]:
        """Fill ``block`` with ``size`` bytes after another; yield how many."""
        if size > len(self.block.memory):  # a single row is longer
            self.block = Block(size)
        for part in tensor.blocks(self.block, size):
            if self.stop.is_set():
                raise Stopped
            yield part


class Worker:
    """What one thread needs to carry out steps.

    Args:
        target: whose range.
        input_scales: the scale of each linear's activations, where they are static.
        stop: set when the run is over.
    """

    def __init__(self, target: Target, input_scales: dict[str, float], stop: threading.Event) -> None:
        self.target = target
        self.input_scales = input_scales
        self._reader = Reader(stop)
        self._codes = Block(BLOCK_ELEMENTS)

    def carry_out(self, step: Step, writer: Writer) -> Layer | None:
        """Write what a step says; return what became of its linear.

        Raises:
            ValueError: what is read is not fit for it.
            OSError: it cannot be written.
            Stopped: the run is over.
        """
        match step:
            case Copy():
                self._copy(step, writer)
                return None
            case Quantize(per_tensor=True):
                return self._quantize_per_tensor(step, writer)
            case Quantize():
                return self._quantize_per_channel(step, writer)
            case Refit():
                return self._refit(step, writer)

    def _copy(self, step: Copy, writer: Writer) -> None:
        tensor = step.source
        size = BLOCK_ELEMENTS * 2
        start = 0
        for part in self._reader.parts(tensor, size):
            if tensor.dtype in FLOATS:
                numbers = self._reader.block.tensor[:part].view(TORCH_DTYPES[tensor.dtype])
                _check_finite(numbers.to(torch.float32, copy=True).abs_().amax(), tensor)
            writer.write(tensor.name, self._reader.block.memory[:part], start)
            start += part

    def _quantize_per_channel(self, step: Quantize, writer: Writer) -> Layer:
        # One tensor for all of them: small ones that stay would keep the rows' memory from being used again.
        scales = torch.empty(step.source.shape[0], 1)
        error = Error()
        for row, values in self._reader.values(step.source):
            largest = values.abs().amax(dim=1, keepdim=True)
            _check_finite(largest.amax(), step.source)
            scale = weights.scale_of(largest, self.target)
            self._encode(step.module, row, values, scale, error, writer)
            scales[row : row + len(scale)] = scale
        _write_scale(writer, f"{step.module}.weight_scale", scales)
        return self._finish(step, error, writer)

    def _quantize_per_tensor(self, step: Quantize, writer: Writer) -> Layer:
        largest = torch.zeros(1)
        for _, values in self._reader.values(step.source):
            torch.maximum(largest, values.abs_().amax(), out=largest)
        _check_finite(largest, step.source)
        scale = weights.scale_of(largest, self.target)
        error = Error()
        for row, values in self._reader.values(step.source):
            self._encode(step.module, row, values, scale, error, writer)
        _write_scale(writer, f"{step.module}.weight_scale", scale)
        return self._finish(step, error, writer)

    def _finish(self, step: Quantize, error: Error, writer: Writer) -> Layer:
        if step.static:
            scale = torch.tensor([self.input_scales[step.module]])
            _write_scale(writer, f"{step.module}.input_scale", scale)
        rows, width = step.source.shape
        return Layer(step.module, (rows, width), error.relative())

    def _refit(self, step: Refit, writer: Writer) -> Layer:
        scale = load(step.scale).float()
        if not scale.isfinite().all() or (scale < 0).any():
            raise ValueError(
                f"{_where(step.scale)} holds a scale that is NaN, Inf or negative; the checkpoint is broken"
            )
        rows, width = step.source.shape
        error = Error()
        new_scales = torch.empty(rows, 1)
        largest = 0
        for row, codes in self._reader.codes(step.source):
            magnitudes = codes & 0x7F
            largest = max(largest, int(magnitudes.amax()))
            lost = magnitudes.bool() & (scale_of_rows(scale, step.source.shape, step.block, row, codes) == 0)
            if largest == NAN_CODE or lost.any():
                what = "NaN" if largest == NAN_CODE else "weights whose scale is zero"
                raise ValueError(f"{_where(step.source)} holds {what}; the checkpoint is broken")
        halved = largest > self.target.max_code and step.block is None
        for row, codes in self._reader.codes(step.source):
            old = scale_of_rows(scale, step.source.shape, step.block, row, codes)
            if step.block is not None:
                values = weights.decode(codes).mul_(old)
                new = weights.scale_of(values.abs().amax(dim=1, keepdim=True), self.target)
                self._encode(step.module, row, values, new, error, writer)
            else:
                new, fitted = old, codes
                if halved:
                    fitted, new = weights.halve(codes, old)
                    error.add(weights.decode(codes).mul_(old), weights.decode(fitted).mul_(new))
                self._write_codes(step.module, row, fitted, writer)
            new_scales[row : row + len(codes)] = new
        _write_scale(writer, f"{step.module}.weight_scale", new_scales)
        if step.input_scale is not None:
            # What clipped at 448 is to clip at R now.
            static = load(step.input_scale).float().amax().view(1) * (TRN3.fp8_max / self.target.fp8_max)
            _write_scale(writer, f"{step.module}.input_scale", static)
        return Layer(step.module, (rows, width), error.relative(), halved)

    def _encode(
        self,
        module: str,
        row: int,
        values: torch.Tensor,
        scale: torch.Tensor,
        error: Error,
        writer: Writer,
    ) -> None:
        """Write the codes of some rows, and note how far they are from the rows, which are used up."""
        codes = weights.encode(values, scale, self.target).view(torch.uint8)
        self._write_codes(module, row, codes, writer)
        error.add(values, weights.decode(codes).mul_(scale))

    def _write_codes(self, module: str, row: int, codes: torch.Tensor, writer: Writer) -> None:
        size = codes.numel()
        if size > len(self._codes.memory):
            self._codes = Block(size)
        self._codes.tensor[:size].copy_(codes.reshape(-1))
        writer.write(f"{module}.weight", self._codes.memory[:size], row * codes.shape[1])


class Error:
    """Sums the squares of a weight and of its difference from another."""

    def __init__(self) -> None:
        self._difference = self._weight = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count some rows; ``after`` is used up."""
        self._weight += float(torch.linalg.vector_norm(before)) ** 2
        self._difference += float(torch.linalg.vector_norm(after.sub_(before))) ** 2

    def relative(self) -> float:
        """Return the root of the quotient; 0 for a weight of zeros."""
        return math.sqrt(self._difference / self._weight) if self._weight else 0.0


def _rows_at_a_time(width: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(width, 1))


def scale_of_rows(
    scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, row: int, codes: torch.Tensor
) -> torch.Tensor:
    """Return what to multiply some rows of codes by.

    Args:
        scale: all scales of the weight.
        shape: the weight's, ``[N, H]`` or ``[experts, N, H]``.
        block: rows and columns that share a scale, or ``None``.
        row: number of the first of the rows, counted through all experts.
        codes: the rows, ``[rows, H]``.

    Returns:
        ``[rows, H]`` for blocks, else ``[rows, 1]`` or ``[1, 1]``.
    """
    if block is None:
        column = scale.view(-1, 1)
        return column if len(column) == 1 else column[row : row + codes.shape[0]]
    numbers = torch.arange(row, row + codes.shape[0])
    expert, within = numbers // shape[-2], numbers % shape[-2]
    lines = scale.view(-1, -(-shape[-1] // block[1]))
    of_rows = lines[expert * (len(lines) // math.prod(shape[:-2])) + within // block[0]]
    return of_rows.repeat_interleave(block[1], dim=1)[:, : shape[-1]]


def _check_finite(largest: torch.Tensor, tensor: Tensor) -> None:
    if not largest.isfinite():
        raise ValueError(f"{_where(tensor)} holds NaN or Inf; the checkpoint is broken")


def _where(tensor: Tensor) -> str:
    return f"{tensor.path}: {tensor.name}" if isinstance(tensor, FileTensor) else tensor.name


def _write_scale(writer: Writer, name: str, scale: torch.Tensor) -> None:
    content = Block(scale.numel() * 4)
    content.tensor.copy_(scale.contiguous().view(-1).view(torch.uint8))
    writer.write(name, content.memory)
