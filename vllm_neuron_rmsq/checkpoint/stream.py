"""Carries out the steps of a plan, a block of rows at a time.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
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
        self.stop = stop
        self._block = Block(BLOCK_ELEMENTS * 2)
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
        for part in self._parts(tensor, size):
            if tensor.dtype in FLOATS:
                numbers = self._block.tensor[:part].view(TORCH_DTYPES[tensor.dtype])
                _check_finite(numbers.to(torch.float32, copy=True).abs_().amax(), tensor)
            writer.write(tensor.name, self._block.memory[:part], start)
            start += part

    def _quantize_per_channel(self, step: Quantize, writer: Writer) -> Layer:
        scales, error = [], Error()
        for row, values in self._rows(step.source):
            largest = values.abs().amax(dim=1, keepdim=True)
            _check_finite(largest.amax(), step.source)
            scale = weights.scale_of(largest, self.target)
            self._encode(step.module, row, values, scale, error, writer)
            scales.append(scale)
        _write_scale(writer, f"{step.module}.weight_scale", torch.cat(scales))
        return self._finish(step, error, writer)

    def _quantize_per_tensor(self, step: Quantize, writer: Writer) -> Layer:
        largest = torch.stack([values.abs_().amax() for _, values in self._rows(step.source)]).amax()
        _check_finite(largest, step.source)
        scale = weights.scale_of(largest, self.target).view(1)
        error = Error()
        for row, values in self._rows(step.source):
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
        new_scales = []
        halved = False
        if step.block is None:
            channels = scale.view(-1, 1).expand(rows, 1)
            halved = any(largest > self.target.max_code for _, _, largest in self._codes_of(step.source))
        for row, codes, _ in self._codes_of(step.source):
            if step.block is not None:
                values = weights.decode(codes).mul_(_of_blocks(scale, step.block, row, codes.shape))
                new = weights.scale_of(values.abs().amax(dim=1, keepdim=True), self.target)
                self._encode(step.module, row, values, new, error, writer)
            else:
                new = channels[row : row + codes.shape[0]]
                fitted = codes
                if halved:
                    fitted, new = weights.halve(codes, new)
                    before, after = weights.decode(codes), weights.decode(fitted).mul_(2)
                    error.add(before.mul_(new), after.mul_(new))
                self._write_codes(step.module, row, fitted, writer)
            new_scales.append(new)
        _write_scale(writer, f"{step.module}.weight_scale", torch.cat(new_scales))
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

    def _rows(self, tensor: Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row's number and the values, fp32, of some rows each."""
        rows, width = tensor.shape
        element = tensor.nbytes // max(rows * width, 1)
        row = 0
        for part in self._parts(tensor, _rows_at_a_time(width) * width * element):
            values = self._block.rows(part, tensor.dtype, width).to(torch.float32, copy=True)
            yield row, values
            row += values.shape[0]

    def _codes_of(self, tensor: Tensor) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Yield the first row's number, the codes, uint8, and the largest, sign aside, of some rows each."""
        _, width = tensor.shape
        row = 0
        for part in self._parts(tensor, _rows_at_a_time(width) * width):
            codes = self._block.tensor[:part].view(-1, width)
            largest = int((codes & 0x7F).amax())
            if largest == NAN_CODE:
                raise ValueError(f"{_where(tensor)} holds NaN; the checkpoint is broken")
            yield row, codes, largest
            row += codes.shape[0]

    def _parts(self, tensor: Tensor, size: int) -> Iterator[int]:
        if size > len(self._block.memory):  # a single row is longer
            self._block = Block(size)
        for part in tensor.blocks(self._block, size):
            if self.stop.is_set():
                raise Stopped
            yield part


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


def _of_blocks(scale: torch.Tensor, block: tuple[int, int], row: int, shape: torch.Size) -> torch.Tensor:
    """Return the scale of every element of some rows, from one a block."""
    rows = torch.arange(row, row + shape[0]).div_(block[0], rounding_mode="floor")
    return scale[rows].repeat_interleave(block[1], dim=1)[:, : shape[1]]


def _check_finite(largest: torch.Tensor, tensor: Tensor) -> None:
    if not largest.isfinite():
        raise ValueError(f"{_where(tensor)} holds NaN or Inf; the checkpoint is broken")


def _where(tensor: Tensor) -> str:
    return f"{tensor.path}: {tensor.name}" if isinstance(tensor, FileTensor) else tensor.name


def _write_scale(writer: Writer, name: str, scale: torch.Tensor) -> None:
    content = Block(scale.numel() * 4)
    content.tensor.copy_(scale.contiguous().view(-1).view(torch.uint8))
    writer.write(name, content.memory)
