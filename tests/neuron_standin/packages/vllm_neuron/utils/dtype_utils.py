"""FP8 KV caches."""

import torch

QUANTIZED_KV_CACHE_DTYPES = ["fp8", "fp8_e4m3"]
FP8_CLAMP_MAX = 240.0


def validate_fp8_segmented_supported(kv_is_fp8: bool, fp8_packed: bool) -> None:
    if kv_is_fp8 and not fp8_packed:
        raise NotImplementedError("FP8 segmented prefill requires a packed KV cache")


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
