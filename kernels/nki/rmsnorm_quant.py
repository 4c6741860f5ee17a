"""The names NKI Library publishes for its RMSNorm-Quant kernel; the kernel is in :mod:`.rms_norm_quant`."""

from .rms_norm_quant import (
    DtypeMode,
    NormType,
    QuantizationType,
    RmsNormQuantKernelArgs,
    rmsnorm_quant_kernel,
)

__all__ = ["DtypeMode", "NormType", "QuantizationType", "RmsNormQuantKernelArgs", "rmsnorm_quant_kernel"]
