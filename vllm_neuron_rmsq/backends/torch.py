"""Backend ``torch``: plain PyTorch, any device. Correct everywhere, fast nowhere in particular."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.backends.base import Backend
from vllm_neuron_rmsq.target import Target
from vllm_neuron_rmsq.weights import BLOCK

BLOCK_ELEMENTS = 1 << 21
"""Weight elements converted to fp32 at a time: the copy stays in cache and never grows with the layer."""


class TorchFunctions:
    """The reference's formulas, and a matmul of decoded codes."""

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
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`."""
        out, total = reference.compute(hidden, weight, eps, residual, lower_bound, static_scale, target)
        return out, None if residual is None else total.contiguous()

    def silu_mul_quant(self, gate_up: Tensor, static_scale: Tensor | None, target: Target) -> Tensor:
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`."""
        return reference.compute_silu_mul(gate_up, static_scale, target)

    def prepack_fp8_weight(self, weight: Tensor, blocks: bool) -> Tensor:
        """The matmul reads the checkpoint's layout."""
        return weight

    def packed_fp8_linear(
        self,
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        static_scale: Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """FP8 values and their products are exact in fp32, so only the sums and the scales round."""
        codes, scale = fmt.unpack(packed) if static_scale is None else (packed, static_scale)
        lead = codes.shape[:-1]
        x = codes.view(torch.float8_e4m3fn).reshape(-1, codes.shape[-1]).float()
        out = torch.empty((x.shape[0], out_features), dtype=torch.float32, device=packed.device)
        step = max(1, BLOCK_ELEMENTS // x.shape[1] // BLOCK) * BLOCK
        for start in range(0, out_features, step):
            columns, decoded = out[:, start : start + step], _decode(weight[start : start + step])
            if weight_scale.dim() == 1:
                torch.mm(x, decoded.t(), out=columns)
            else:
                of_block = weight_scale[start // BLOCK :].repeat_interleave(BLOCK, dim=0)[: len(decoded)]
                columns.zero_()
                for x_part, part, factor in zip(
                    x.split(BLOCK, dim=1), decoded.split(BLOCK, dim=1), of_block.unbind(1), strict=True
                ):
                    columns.addcmul_(x_part @ part.t(), factor)
        out = out * scale.reshape(-1, 1)
        if weight_scale.dim() == 1:
            out = out * weight_scale
        if bias is not None:
            out = out + bias.float()
        return out.to(out_dtype).reshape(*lead, out_features)


def _decode(codes: Tensor) -> Tensor:
    """Decode uint8 FP8 codes to fp32, exactly and several times as fast as torch's own conversion on a CPU.

    Sign, exponent and mantissa move to their places in a bfloat16; what is missing is the difference of the
    two exponent biases, a factor 2^(127-7), which also turns subnormals into the normal numbers they are.
    """
    if codes.numel() and int((codes & 0x7F).amax()) == fmt.NAN_CODE:
        return codes.view(torch.float8_e4m3fn).float()
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4)
    return bits.bitwise_and_(-0x7810).view(torch.bfloat16).mul_(2.0**120).float()  # keeps bits 0x87F0


BACKEND = Backend(
    name="torch",
    unavailable=lambda: None,
    functions=TorchFunctions(),
    devices=("cpu", "cuda"),
    serves=("cpu",),
)
