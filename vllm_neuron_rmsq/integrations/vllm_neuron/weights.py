"""From a checkpoint's FP8 tensors to the parameters of one rank: vLLM Neuron's loader calls what is attached
here.

Dimensions:
    N: output features   H: input features, of the whole linear or of this rank's part of it

The loader gives a parameter the tensors its keys name, as slices that are read when indexed, and the
checkpoint's tensors are cut here. A column-parallel linear takes some of the rows (N) and their scales, a
row-parallel one some of the columns (H) and all scales. Several linears that read the same input are stacked
over N, each with its own scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm_neuron.utils.weight_loader import SafetensorsWeightLoader, set_weight_loader

from vllm_neuron_rmsq import backends, ops, weights
from vllm_neuron_rmsq.integrations.vllm_neuron.functional import Kernels
from vllm_neuron_rmsq.packed import NAN_CODE
from vllm_neuron_rmsq.target import Target

ROWS_AT_A_TIME = 4096
"""Rows read at once where a whole tensor is searched."""


class Part(NamedTuple):
    """This rank's part of one linear in the checkpoint.

    Attributes:
        name: the linear's, as in ``model.layers.0.mlp.up_proj``.
        shape: of the whole weight, ``(N, H)``.
        rows: which of N.
        columns: which of H.
    """

    name: str
    shape: tuple[int, int]
    rows: slice
    columns: slice

    @property
    def size(self) -> tuple[int, int]:
        """``(N, H)`` of the part."""
        return len(range(*self.rows.indices(self.shape[0]))), len(range(*self.columns.indices(self.shape[1])))


WHOLE = slice(None)


def attach(
    parameter: nn.Parameter, keys: list[str], load: Callable[[list[Any], int], Tensor]
) -> nn.Parameter:
    """Say how vLLM Neuron's loader fills a parameter.

    Args:
        keys: of the checkpoint's tensors.
        load: makes the parameter's value of ``(slices, rank)``, one slice a key.
    """
    set_weight_loader(parameter, SafetensorsWeightLoader(transform=load))
    parameter.rmsq_keys = keys  # type: ignore[attr-defined]
    return parameter


def mappings(model: nn.Module) -> dict[str, str | list[str]]:
    """Return the keys that :func:`attach` gave the parameters of ``model``, by the parameters' names."""
    named = model.named_parameters()
    return {name: parameter.rmsq_keys for name, parameter in named if hasattr(parameter, "rmsq_keys")}


class Source:
    """The FP8 tensors that a parameter is made of: linears stacked over N.

    Attributes:
        parts: one for each linear.
        keys: ``weight`` and ``weight_scale`` of each, in turn.
        halved: which linears had to be halved, by name; filled while loading.
    """

    def __init__(self, parts: list[Part], target: Target) -> None:
        self.parts, self.target = parts, target
        self.keys = [f"{part.name}.{tensor}" for part in parts for tensor in ("weight", "weight_scale")]
        self.halved: dict[str, bool] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, H)`` of the stack on this rank."""
        return sum(part.size[0] for part in self.parts), self.parts[0].size[1]

    def fitted(self, slices: list[Any]) -> tuple[Tensor, Tensor]:
        """Return codes ``[N, H]`` uint8 and scales ``[N]`` fp32 within the target's range.

        A tensor is halved whole or not at all, whatever part of it a rank has, so that the ranks agree.
        """
        codes, scales = [], []
        for part, weight, scale in self._each(slices):
            own, own_scale = _codes(part, weight), _scale(part, scale)
            if self._halves(part, weight, own):
                own, own_scale = weights.halve(own, own_scale)
            codes.append(own)
            scales.append(own_scale)
        return torch.cat(codes), torch.cat(scales)

    def fitted_scale(self, slices: list[Any]) -> Tensor:
        """Return the scales of :meth:`fitted` alone."""
        scales = []
        for part, weight, scale in self._each(slices):
            if part.name not in self.halved:
                self._halves(part, weight, _codes(part, weight))
            own = _scale(part, scale)
            scales.append(own * 2 if self.halved[part.name] else own)
        return torch.cat(scales)

    def dequantized(self, slices: list[Any], dtype: torch.dtype) -> Tensor:
        """Return the weight as numbers, ``[H, N]``."""
        values = [
            _codes(part, weight).view(torch.float8_e4m3fn).float() * _scale(part, scale)[:, None]
            for part, weight, scale in self._each(slices)
        ]
        return torch.cat(values).to(dtype).T.contiguous()

    def _each(self, slices: list[Any]):
        return zip(self.parts, slices[::2], slices[1::2], strict=True)

    def _halves(self, part: Part, weight: Any, own: Tensor) -> bool:
        """Whether the tensor holds codes beyond the target's; most often this rank's part says so already."""
        if part.name not in self.halved:
            limit = self.target.max_code
            found = _largest(own) > limit
            for start in range(0, part.shape[0], ROWS_AT_A_TIME):
                if found:
                    break
                found = _largest(weight[start : start + ROWS_AT_A_TIME].view(torch.uint8)) > limit
            self.halved[part.name] = found
        return self.halved[part.name]


def _largest(codes: Tensor) -> int:
    """The largest code, sign aside."""
    return int((codes & 0x7F).amax())


def _codes(part: Part, weight: Any) -> Tensor:
    """The part's codes, ``[N, H]`` uint8.

    Raises:
        ValueError: the tensor is of another dtype or shape than the linear's, or holds NaN.
    """
    dtype, shape = weight.get_dtype(), tuple(weight.get_shape())
    if dtype != "F8_E4M3" or shape != part.shape:
        raise ValueError(
            f"{part.name}.weight: expected FP8 codes, F8_E4M3 of shape {list(part.shape)}, got {dtype} of "
            f"shape {list(shape)}"
        )
    codes = weight[part.rows, part.columns].view(torch.uint8)
    if _largest(codes) == NAN_CODE:
        raise ValueError(
            f"{part.name}.weight: holds NaN; the checkpoint is corrupt or was quantized from a corrupt one"
        )
    return codes


def _scale(part: Part, scale: Any) -> Tensor:
    """The part's scales, ``[N]`` fp32.

    Raises:
        ValueError: neither one scale a channel nor one in all, or NaN or Inf among them.
    """
    values = scale[...].float().reshape(-1)
    if values.numel() not in (1, part.shape[0]):
        raise ValueError(
            f"{part.name}.weight_scale: expected {part.shape[0]} scales, one a channel, or 1; got shape "
            f"{list(scale.get_shape())}"
        )
    if not values.isfinite().all():
        raise ValueError(
            f"{part.name}.weight_scale: holds NaN or Inf; the checkpoint is corrupt or was quantized from a "
            "corrupt one"
        )
    return values[part.rows] if values.numel() > 1 else values.expand(part.size[0]).clone()


class RowFp8Linear(nn.Module):
    """A linear that multiplies packed rows by this rank's part of an FP8 weight.

    Attributes:
        weight: uint8, laid out for the backend.
        weight_scale: ``[N]`` fp32.
    """

    def __init__(self, parts: list[Part], target: Target, kernels: Kernels) -> None:
        super().__init__()
        self.source, self.kernels = Source(parts, target), kernels
        prepacked_shape = backends.get(kernels.backend).prepacked_shape
        n, k = self.source.shape
        shape = (n, k) if prepacked_shape is None else prepacked_shape(n, k, False)
        self.weight = _parameter(shape, torch.uint8)
        self.weight_scale = _parameter((n,), torch.float32)
        attach(self.weight, self.source.keys, self._load_weight)
        attach(self.weight_scale, self.source.keys, lambda slices, rank: self.source.fitted_scale(slices))

    def _load_weight(self, slices: list[Any], rank: int) -> Tensor:
        codes, scale = self.source.fitted(slices)
        return ops.prepack_fp8_weight(codes, scale, self.kernels.backend).data

    def forward(self, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[T, H + 4]`` uint8 packed rows to ``[T, N]``."""
        return self.kernels.linear(packed, self.weight, self.weight_scale, bias, self.source.shape)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def bias(parts: list[Part], dtype: torch.dtype, once: bool) -> nn.Parameter:
    """Return a parameter for the biases of stacked linears, ``[N]``.

    Args:
        once: the ranks' results are added up, so one rank alone has the bias and the others zeros.
    """

    def load(slices: list[Any], rank: int) -> Tensor:
        found = []
        for part, values in zip(parts, slices, strict=True):
            if tuple(values.get_shape()) != (part.shape[0],):
                raise ValueError(
                    f"{part.name}.bias: expected shape {[part.shape[0]]}, got {list(values.get_shape())}"
                )
            found.append(values[part.rows])
        stacked = torch.cat(found).to(dtype)
        return torch.zeros_like(stacked) if once and rank else stacked

    parameter = _parameter((sum(part.size[0] for part in parts),), dtype)
    return attach(parameter, [f"{part.name}.bias" for part in parts], load)


def dequantize_into(parameter: nn.Parameter, parts: list[Part], target: Target) -> None:
    """Have a stock parameter ``[H, N]`` filled with FP8 linears' weights as numbers."""
    source = Source(parts, target)
    dtype = parameter.dtype
    attach(parameter, source.keys, lambda slices, rank: source.dequantized(slices, dtype))
