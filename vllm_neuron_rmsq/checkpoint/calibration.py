"""Scales of activations that do not depend on the token: the largest number that a text brings about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from vllm_neuron_rmsq.target import Target

WINDOW = 512
"""Tokens that the model sees at once."""


def load(source: Path) -> tuple[Any, Any]:
    """Return model, in bf16, and tokenizer of a checkpoint directory.

    Raises:
        ValueError: transformers cannot load them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizer's own are of no other class
        raise ValueError(f"{source}: cannot be loaded to calibrate it ({error})") from error


def input_scales(
    model: Any,
    tokenizer: Any,
    linears: Iterable[str],
    text: str,
    target: Target,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Return the scale of each linear's input: the largest magnitude that the text brings about, over R.

    Args:
        model: of transformers.
        tokenizer: of transformers.
        linears: names of modules.
        text: what to run the model on, in windows of 512 tokens.
        target: whose R.
        progress: told about every window.

    Raises:
        ValueError: the text is empty, a linear is not in the model, or no token has reached it.
    """
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    if not len(tokens):
        raise ValueError("calibration text: is empty")
    modules = dict(model.named_modules())
    largest = dict.fromkeys(linears, 0.0)
    missing = [name for name in largest if name not in modules]
    if missing:
        raise ValueError(
            f"{missing[0]}: is not in the model as transformers loads it; ignore it or use another scheme"
        )

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().amax()))

        return hook

    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in largest]
    try:
        windows = tokens.split(WINDOW)
        for done, window in enumerate(windows):
            if progress is not None:
                progress(done, len(windows), "calibration")
            with torch.inference_mode():
                model(window[None])
    finally:
        for hook in hooks:
            hook.remove()
    unreached = [name for name, found in largest.items() if not 0 < found < float("inf")]
    if unreached:
        raise ValueError(
            f"{unreached[0]}: the calibration text brings nothing about there; give a longer text"
        )
    return {name: found / target.fp8_max for name, found in largest.items()}
