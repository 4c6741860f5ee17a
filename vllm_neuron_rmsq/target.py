"""What the codes are for: the range and the FP8 format of a generation of Trainium.

``trn2`` keeps codes within ±240, so that a byte means the same number in ``float8_e4m3`` (Trainium2, whose
exponent 15 is Inf or NaN) and in ``float8_e4m3fn`` (everyone else). ``trn3`` uses the whole OCP range, ±448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """A range of FP8 codes and whose it is.

    Attributes:
        name: what settings call it.
        fp8_max: R, the largest magnitude of a code's value.
        max_code: the code of that value, sign bit aside. Larger ones are Inf or NaN to this hardware.
        nki_dtype: name of the codes' dtype in an NKI kernel.
    """

    name: str
    fp8_max: float
    max_code: int
    nki_dtype: str

    def __str__(self) -> str:
        return self.name

    def static_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the scale of activations, for codes of this target, for which a checkpoint gives ``scale``.

        Checkpoints mean codes within ±448. Where the range ends at ±240 the scale is doubled, as a weight's
        is: the codes are half of those meant, exactly, but for odd ones among the subnormals.

        Args:
            scale: fp32, of any shape.
        """
        return scale if self.fp8_max == OCP_MAX else scale * 2


OCP_MAX = 448.0
"""The largest value of a ``float8_e4m3fn``."""

TRN2 = Target("trn2", 240.0, 0x77, "float8_e4m3")
TRN3 = Target("trn3", OCP_MAX, 0x7E, "float8_e4m3fn")

TARGETS = {target.name: target for target in (TRN2, TRN3)}
"""Every target by name; the first is the default."""

_BY_FP8_MAX = {target.fp8_max: target for target in TARGETS.values()}


def get(target: Target | str | None) -> Target:
    """Return the target itself, the one of that name, or the default for ``None``.

    Raises:
        ValueError: there is no target of that name.
    """
    if isinstance(target, Target):
        return target
    if target is None:
        return TRN2
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}; got {target!r}")
    return TARGETS[target]


def of_fp8_max(fp8_max: float) -> Target:
    """Return the target whose largest code value is ``fp8_max``: an op's schema has no other way to name it.

    Raises:
        ValueError: there is none.
    """
    if fp8_max not in _BY_FP8_MAX:
        raise ValueError(f"fp8_max: expected {' or '.join(f'{m:g}' for m in _BY_FP8_MAX)}, got {fp8_max:g}")
    return _BY_FP8_MAX[fp8_max]
