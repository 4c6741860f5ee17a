"""Patch: vLLM Neuron's platform refuses FP8 weights, except those that our factory takes.

What: wraps ``NeuronPlatform._validate_quantization_config``. It is called first, as it is; where it raises
    ValueError, the error is dropped if ``lift`` says so of the configuration.
Why: the platform raises for every compressed-tensors checkpoint with quantized weights, and asks nobody.
Versions: vLLM Neuron 0.24.0.1.1.0 and 0.29.0.1.2.0.
Delete when: vLLM Neuron serves FP8-dynamic checkpoints, or asks a model's class whether it takes one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def apply(platform: type, lift: Callable[[Any], bool]) -> None:
    """Patch the platform's class, once.

    Args:
        platform: the class.
        lift: of the configuration that was refused, whether to let it through.
    """
    original = platform._validate_quantization_config.__func__  # type: ignore[attr-defined]
    if getattr(original, "rmsq", False):
        return

    @functools.wraps(original)
    def validate(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, *args, **kwargs)
        except ValueError:
            configs = [value for value in (*args, *kwargs.values()) if hasattr(value, "model_config")]
            if not configs or not lift(configs[0]):
                raise

    validate.rmsq = True  # type: ignore[attr-defined]
    platform._validate_quantization_config = classmethod(validate)  # type: ignore[attr-defined]
