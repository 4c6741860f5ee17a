"""What a backend is: a record, and the functions behind it.

Dimensions:
    H: hidden size, the contraction dimension
    I: intermediate size
    N: output features of a linear
    ...: rows (tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, dtype

from vllm_neuron_rmsq.target import Target


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run here; the message says why and what to do."""


class Counts(NamedTuple):
    """What a backend has done in this process.

    Attributes:
        rows: rows quantized, by a norm, an activation function or a linear itself.
        invalid: those among them that held NaN or Inf, or exceeded fp32's range.
    """

    rows: int
    invalid: int


class Functions(Protocol):
    """What a backend computes, on arguments that ``ops`` has checked; the numbers are ``reference``'s."""

    def rms_norm_quant(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        eps: float,
        residual: Tensor | None,
        lower_bound: float,
        static_scale: Tensor | None,
        target: Target,
    ) -> tuple[Tensor, Tensor | None]:
        """Normalize and quantize.

        Args:
            hidden: ``[..., H]`` bf16, fp16 or fp32.
            weight: ``[H]`` gamma, or ``None`` for no norm.
            residual: like ``hidden``, or ``None``.
            static_scale: one fp32 element, or ``None`` for a scale a row.

        Returns:
            ``[..., H + 4]`` uint8 packed rows (``[..., H]`` codes with a static scale), and ``residual_out``,
            contiguous, like ``hidden``; ``None`` without a residual.
        """

    def silu_mul_quant(self, gate_up: Tensor, static_scale: Tensor | None, target: Target) -> Tensor:
        """``[..., 2 I]`` (gate, then up) to ``[..., I + 4]`` packed rows, or ``[..., I]`` codes."""

    def prepack_fp8_weight(self, weight: Tensor, blocks: bool) -> Tensor:
        """``[N, H]`` uint8 in the backend's layout, of its ``prepacked_shape``; where it has one.

        ``blocks``: the weight has block scales.
        """

    def packed_fp8_linear(
        self,
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        static_scale: Tensor | None,
        out_features: int,
        out_dtype: dtype,
    ) -> Tensor:
        """Multiply.

        Args:
            packed: ``[..., H + 4]`` uint8, or ``[..., H]`` codes with a static scale.
            weight: ``[N, H]`` uint8, or what ``prepack_fp8_weight`` made of it.
            weight_scale: ``[N]``, ``[1]`` or, block scales, ``[ceil(N / 128), ceil(H / 128)]`` fp32.
            bias: ``[N]`` bf16, fp16 or fp32, or ``None``.
            static_scale: one fp32 element, or ``None`` where each row has its own.
            out_features: N.

        Returns:
            ``[..., N]`` of ``out_dtype``.
        """


@dataclass(frozen=True)
class Backend:
    """One way to compute the contract.

    Attributes:
        name: what settings and callers call it.
        unavailable: returns why it cannot run here and what to do about it, or ``None``. A question: asking
            changes nothing about what is computed.
        functions: what it computes; ``None`` where the implementations are registered from C++.
        devices: device types (``torch.device.type``) whose tensors ``auto`` gives it.
        serves: device types where ``auto`` puts it in place of vLLM's layers, being faster than those.
        prepacked_shape: shape ``(n, h, blocks) -> (...)`` of the weight in a layout of its own, ``blocks``
            saying whether it has block scales; ``None`` where its matmul reads the checkpoint's ``[N, H]`` as
            it is.
        details: where it can run, what ``check`` says of how.
        level: where it can run, which of several ways to compute is in force, "avx2"; else empty.
        counts: where it can run, what it has done in this process; ``None`` where it does not count.
        traced: whether a compiled graph must hold the calls its functions make, not the op's overload: a
            compiler that knows those calls does not know our ops.
    """

    name: str
    unavailable: Callable[[], str | None]
    functions: Functions | None
    devices: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    prepacked_shape: Callable[[int, int, bool], tuple[int, ...]] | None = None
    details: Callable[[], str] = lambda: ""
    level: Callable[[], str] = lambda: ""
    counts: Callable[[], Counts] | None = None
    traced: Callable[[], bool] = lambda: False
