"""The plugin's settings: environment variables, and the same keys under ``rmsq`` in vLLM's
``--additional-config``, which win. One frozen object; unknown keys and misspelt values are errors."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_neuron_rmsq import backends
from vllm_neuron_rmsq.backends import cpu
from vllm_neuron_rmsq.target import TARGETS

PREFIX = "VLLM_RMSQ_"
METRICS_FOLDER = PREFIX + "METRICS_FOLDER"
"""No setting: set by the plugin for the processes that vLLM starts (:mod:`.integrations.metrics`)."""


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        backend: who computes; ``auto`` is the best usable one, ``off`` leaves vLLM as it is (``ops`` called
            directly take ``auto`` then).
        target: code range, ``trn2`` (±240) or ``trn3`` (±448).
        fuse: quantize in the norm or activation function that is proven to feed only FP8 linears.
        strict: an unfused decoder norm is a start-up error.
        cpu_isa: instruction-set level of backend ``cpu``; ``auto`` is the best this machine has.
        attention: on vLLM Neuron, how much of attention multiplies in FP8: ``bf16`` nothing (the stock
            attention, weights dequantized while loading), ``fp8-prefill`` QKV in prefill and the output
            projection, ``fp8`` QKV in decode as well.
        gather: on vLLM Neuron, what the ranks gather in prefill: packed rows as ``uint8``, or as views of
            them as ``float8`` or ``int32``, should a compiler not gather bytes, or ``bf16``, rows before they
            are quantized, at twice the bytes.
    """

    backend: str = "auto"
    target: str = "trn2"
    fuse: bool = True
    strict: bool = False
    cpu_isa: str = "auto"
    attention: str = "bf16"
    gather: str = "uint8"

    @classmethod
    def load(
        cls, environ: Mapping[str, str] | None = None, additional_config: Mapping[str, Any] | None = None
    ) -> Settings:
        """Read the environment, then ``additional_config["rmsq"]`` over it.

        Args:
            environ: environment variables; ``None`` is ``os.environ``.
            additional_config: vLLM's ``additional_config``; other plugins' keys in it are ignored.

        Raises:
            ValueError: an unknown ``VLLM_RMSQ_*`` variable or ``rmsq`` key, or a value that is not valid.
        """
        environ = os.environ if environ is None else environ
        valid = choices()
        chosen: dict[str, Any] = {}
        for name, value in environ.items():
            if name.startswith(PREFIX) and name != METRICS_FOLDER:
                key = name.removeprefix(PREFIX).lower()
                if key not in valid or name != PREFIX + key.upper():
                    variables = ", ".join(PREFIX + k.upper() for k in valid)
                    raise ValueError(f"{name}: unknown environment variable; expected one of {variables}")
                chosen[key] = _parse(name, key, value, valid[key])
        config = (additional_config or {}).get("rmsq", {})
        if not isinstance(config, Mapping):
            raise ValueError(
                f"additional_config['rmsq']: expected a mapping of {', '.join(valid)}; got {config!r}"
            )
        for key, value in config.items():
            name = f"additional_config['rmsq'][{key!r}]"
            if key not in valid:
                raise ValueError(f"{name}: unknown setting; expected one of {', '.join(valid)}")
            chosen[key] = _parse(name, key, value, valid[key])
        return cls(**chosen)


def choices() -> dict[str, tuple[str, ...]]:
    """Return the values each setting may have, as text, the default first; backends by the registry."""
    return {
        "backend": ("auto", *backends.names(), "off"),
        "target": tuple(TARGETS),
        "fuse": ("1", "0"),
        "strict": ("0", "1"),
        "cpu_isa": ("auto", *cpu.ISAS),
        "attention": ("bf16", "fp8-prefill", "fp8"),
        "gather": ("uint8", "float8", "int32", "bf16"),
    }


def variables() -> list[str]:
    """Return every environment variable of the plugin's."""
    return [*(PREFIX + key.upper() for key in choices()), METRICS_FOLDER]


def _parse(name: str, key: str, value: Any, valid: tuple[str, ...]) -> Any:
    boolean = {f.name: f.type for f in fields(Settings)}[key] == "bool"
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if text not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(valid)}; got {value!r}")
    return text == "1" if boolean else text


_current: Settings | None = None


def current() -> Settings:
    """Return the settings in force: those installed by :func:`install`, else the environment's."""
    return _from_environment() if _current is None else _current


def install(settings: Settings | None) -> None:
    """Make ``settings`` the ones in force in this process; ``None`` goes back to the environment.

    Raises:
        ValueError: this machine lacks the instruction-set level that ``cpu_isa`` names.
    """
    global _current
    _current = settings
    _from_environment.cache_clear()
    if settings is not None:
        _apply(settings)


@functools.cache
def _from_environment() -> Settings:
    settings = Settings.load()
    _apply(settings)
    return settings


def _apply(settings: Settings) -> None:
    """Put in force what a backend must be told of, as far as that backend can run here."""
    if settings.backend in ("auto", "cpu") and backends.unavailable("cpu") is None:
        cpu.set_isa(settings.cpu_isa)
