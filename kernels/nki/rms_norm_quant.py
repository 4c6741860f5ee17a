"""Fused RMSNorm + FP8 quantization: the API of NKI Library's ``rmsnorm_quant_kernel``, schedules of its own.

Dimensions:
    T: rows, every dimension of the input but the last, collapsed
    H: hidden size, the dimension that is normalized and quantized
    R: largest code value, 240 (NON_OCP, Trainium2) or 448 (OCP, Trainium3)

Each row of ``hidden [T, H]`` becomes H FP8 codes and its fp32 scale, H + 4 bytes; in fp32
(``vllm_neuron_rmsq.reference`` states it in torch)::

    x     = hidden [+ residual]
    y     = x * rsqrt(mean(x²) + eps) * gamma           NO_NORM: y = x
    y     = clip(y, ±lower_bound)                       only where there is a lower bound
    scale = max(max|y| / R, 1e-6)                       STATIC: scale is given
    code  = to_fp8(clip(y / scale, ±R))

This module has the entries and their checks, and chooses the schedule: :mod:`.rms_norm_quant_prefill` or
:mod:`.rms_norm_quant_spread`. docs/kernels/rms_norm_quant.md has the design.
"""

from dataclasses import dataclass
from enum import Enum

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator import nki
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .common import fp8_dtype, program_count
from .rms_norm_quant_prefill import quantize_transposed
from .rms_norm_quant_rows import Task
from .rms_norm_quant_spread import quantize_spread

MAX_B = 2
"""Largest batch of a ``[B, S, H]`` input."""
MAX_S = 32768
"""Longest sequence of a ``[B, S, H]`` input."""
MAX_H = 16384
"""Widest row."""

SMALLEST_LOWER_BOUND = 1e-6  # NKI Library's: a lower bound up to here does not clip


class NormType(Enum):
    """What happens before quantization."""

    NO_NORM = 0
    RMS_NORM = 1


class QuantizationType(Enum):
    """Where the dequantization scale comes from: given for all rows, or found for each."""

    STATIC = 1
    ROW = 2


class DtypeMode(Enum):
    """Which FP8 the codes are: float8_e4m3 (±240), OCP's float8_e4m3fn (±448), or the latter on Trainium3."""

    NON_OCP = "non_ocp"
    OCP = "ocp"
    AUTO = "auto"


@dataclass(frozen=True)
class RmsNormQuantKernelArgs(nl.NKIObject):
    """Arguments of the kernel that are known when it is compiled; made outside of it.

    Attributes:
        lower_bound: >= 0; clip normalized values to ±lower_bound, up to 1e-6 does not clip.
        norm_type: ``RMS_NORM`` or ``NO_NORM``; NKI Library's own enum will do, its members are known by name.
        quantization_type: ``ROW`` or ``STATIC``; likewise.
        eps: >= 0, added to the mean square; at least 2^-87 is.

    Raises:
        AssertionError: a value is outside its range; the message names limit and value.
    """

    lower_bound: float = 0.0
    norm_type: NormType = NormType.RMS_NORM
    quantization_type: QuantizationType = QuantizationType.ROW
    eps: float = 1e-6

    def __post_init__(self):
        norm, quantization = f"{self.norm_type}", f"{self.quantization_type}"
        assert norm == "NormType.RMS_NORM" or norm == "NormType.NO_NORM", (
            f"norm_type: expected NormType.RMS_NORM or NormType.NO_NORM, got {self.norm_type}"
        )
        assert quantization == "QuantizationType.ROW" or quantization == "QuantizationType.STATIC", (
            "quantization_type: expected QuantizationType.ROW or QuantizationType.STATIC, "
            f"got {self.quantization_type}"
        )
        assert self.lower_bound >= 0, f"lower_bound: expected >= 0 (0 does not clip), got {self.lower_bound}"
        assert self.eps >= 0, f"eps: expected >= 0, got {self.eps}"

    def needs_rms_normalization(self) -> bool:
        """Return whether RMS normalization is applied."""
        return self.norm_type.name == "RMS_NORM"

    def has_lower_bound(self) -> bool:
        """Return whether normalized values are clipped."""
        return self.lower_bound > SMALLEST_LOWER_BOUND

    def is_static_quant(self) -> bool:
        """Return whether the dequantization scale is given."""
        return self.quantization_type.name == "STATIC"

    def is_row_quant(self) -> bool:
        """Return whether the dequantization scale is found for each row."""
        return self.quantization_type.name == "ROW"


@nki.jit
def rmsnorm_quant_kernel(
    hidden,
    ln_w,
    kargs,
    input_dequant_scale=None,
    pre_norm_gamma=None,
    residual=None,
    dtype_mode=DtypeMode.NON_OCP,
    hidden_actual=None,
):
    """Normalize rows, quantize them to FP8 and pack each with its scale; see the module for what and how.

    Runs without a grid or on a 1-D grid of programs, which share the rows as evenly as they divide.

    Args:
        hidden: ``[B, S, H]``, or any rank >= 2, in HBM; bf16, fp16 or fp32. From rank 3 on the first
            dimension is at most 2, the second 32768, the third 16384; ``[T, H]``: T <= 65536, H <= 16384.
        ln_w: gamma, ``[H]`` or ``[1, H]``; unused (may be None) with NO_NORM.
        kargs: :class:`RmsNormQuantKernelArgs`.
        input_dequant_scale: STATIC: ``[128, 1]`` fp32, the one scale on every partition.
        pre_norm_gamma: ``[H]`` or ``[1, H]``: RMSNorm hidden with this gamma before the residual is added.
        residual: like hidden.
        dtype_mode: :class:`DtypeMode`, or NKI Library's own.
        hidden_actual: what mean squares are over, where rows are padded to H with zeros; None is H.

    Returns:
        ``[..., H + 4]`` FP8 (STATIC: ``[..., H]``) in shared HBM; with a residual a pair of that and
        hidden + residual, rounded to hidden's dtype.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    ocp = wants_ocp(dtype_mode)
    if kargs.is_static_quant():
        assert input_dequant_scale != None, "input_dequant_scale: expected [128, 1] (STATIC), got None"
    if kargs.needs_rms_normalization():
        width = hidden.shape[len(hidden.shape) - 1]
        assert ln_w != None, f"ln_w: expected shape [{width}] or [1, {width}], got None"
    return quantize(
        hidden,
        ln_w if kargs.needs_rms_normalization() else None,
        kargs.eps,
        residual,
        kargs.lower_bound if kargs.has_lower_bound() else None,
        input_dequant_scale if kargs.is_static_quant() else None,
        pre_norm_gamma,
        hidden_actual,
        ocp,
        fp8_dtype(ocp),
    )


@nki.jit
def rms_norm_quant_bytes_kernel(
    hidden,
    weight=None,
    eps=1e-6,
    residual=None,
    lower_bound=0.0,
    static_scale=None,
    ocp=False,
    digest=0,
):
    """:func:`rmsnorm_quant_kernel` as a PyTorch graph calls it: tensors and numbers in, uint8 out.

    uint8 because a graph for Trainium2 may not hold a ``float8_e4m3fn`` tensor, the one 8-bit float of that
    layout PyTorch has.

    Args:
        hidden: ``[..., H]``.
        weight: gamma, ``[H]``; None is NO_NORM.
        eps: added to the mean square.
        residual: like hidden, or None.
        lower_bound: clip normalized values to ±lower_bound; 0 does not clip.
        static_scale: ``[128, 1]`` fp32 is STATIC; None is ROW.
        ocp: codes within ±448 (Trainium3) instead of ±240.
        digest: what a compile cache knows this kernel's sources by (:mod:`.digest`); not used here.

    Returns:
        As :func:`rmsnorm_quant_kernel`, in uint8.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    clip = lower_bound if lower_bound > 0 else None
    return quantize(hidden, weight, eps, residual, clip, static_scale, None, None, ocp, nl.uint8)


def wants_ocp(dtype_mode: DtypeMode) -> bool:
    """Return whether codes are OCP's float8_e4m3fn. NKI Library's enum is another class, alike by name."""
    name = f"{dtype_mode}"
    if name == "DtypeMode.AUTO":
        return nisa.get_nc_version() == nisa.nc_version.gen4
    assert name == "DtypeMode.NON_OCP" or name == "DtypeMode.OCP", (
        f"dtype_mode: expected DtypeMode.NON_OCP or DtypeMode.OCP or DtypeMode.AUTO, got {dtype_mode}"
    )
    return name == "DtypeMode.OCP"


def quantize(
    hidden: nl.NkiTensor,
    gamma: nl.NkiTensor,
    eps: float,
    residual: nl.NkiTensor,
    lower_bound: float | None,
    static_scale: nl.NkiTensor,
    pre_gamma: nl.NkiTensor,
    hidden_actual: int | None,
    ocp: bool,
    out_dtype,
):
    """Check the arguments, choose the schedule, run it; arguments and results as the entries have them.

    gamma None is NO_NORM, static_scale None is ROW, lower_bound None does not clip, hidden_actual None is H.
    """
    check(hidden, gamma, residual, static_scale, pre_gamma, hidden_actual)
    width = hidden.shape[len(hidden.shape) - 1]
    count = width if hidden_actual == None else hidden_actual
    task = Task(hidden, gamma, pre_gamma, residual, static_scale, eps, lower_bound, count, ocp, out_dtype)
    if pre_gamma == None and hidden.dtype != nl.float32 and task.last - task.first > few_rows(width):
        quantize_transposed(task)
    else:
        quantize_spread(task)
    return task.results()


def few_rows(width: int) -> int:
    """Return up to how many rows of H a program is faster with each of them spread over the partitions.

    By the simulator's schedule, without a residual: 4 rows at H = 576, 12 at 2048, 21 at 8192, 26 at 16384.
    """
    return min(26, 4 + width // 480)


def check(
    hidden: nl.NkiTensor,
    gamma: nl.NkiTensor,
    residual: nl.NkiTensor,
    static_scale: nl.NkiTensor,
    pre_gamma: nl.NkiTensor,
    hidden_actual: int | None,
):
    """Assert the limits of the entries' arguments."""
    rank = len(hidden.shape)
    assert rank >= 2, f"hidden: expected rank >= 2, got {rank}"
    width = hidden.shape[rank - 1]
    rows = hidden.size // width
    assert width <= MAX_H, f"hidden: expected H <= {MAX_H}, got {width}"
    if rank > 2:
        assert hidden.shape[0] <= MAX_B, f"hidden: expected B <= {MAX_B}, got {hidden.shape[0]}"
        assert hidden.shape[1] <= MAX_S, f"hidden: expected S <= {MAX_S}, got {hidden.shape[1]}"
        assert hidden.shape[2] <= MAX_H, f"hidden: expected shape[2] <= {MAX_H}, got {hidden.shape[2]}"
    else:
        assert rows <= MAX_B * MAX_S, f"hidden: expected at most {MAX_B * MAX_S} rows, got {rows}"
    assert hidden.dtype == nl.bfloat16 or hidden.dtype == nl.float16 or hidden.dtype == nl.float32, (
        f"hidden: expected dtype bfloat16, float16 or float32, got {hidden.dtype}"
    )
    if gamma != None:
        check_gamma("ln_w", gamma, width)
    if pre_gamma != None:
        check_gamma("pre_norm_gamma", pre_gamma, width)
    if residual != None:
        assert tuple(residual.shape) == tuple(hidden.shape), (
            f"residual: expected shape {tuple(hidden.shape)} (hidden's), got {tuple(residual.shape)}"
        )
        assert residual.dtype == hidden.dtype, (
            f"residual: expected dtype {hidden.dtype} (hidden's), got {residual.dtype}"
        )
    if static_scale != None:
        assert tuple(static_scale.shape) == (nl.tile_size.pmax, 1), (
            f"input_dequant_scale: expected shape ({nl.tile_size.pmax}, 1), got {tuple(static_scale.shape)}"
        )
        assert static_scale.dtype == nl.float32, (
            f"input_dequant_scale: expected dtype float32, got {static_scale.dtype}"
        )
    if hidden_actual != None:
        assert hidden_actual >= 1 and hidden_actual <= width, (
            f"hidden_actual: expected 1 to {width} (H of hidden), got {hidden_actual}"
        )
    programs = program_count()
    assert rows >= programs, f"hidden: expected at least {programs} rows, one per program, got {rows}"


def check_gamma(name: str, gamma: nl.NkiTensor, width: int):
    """Assert that gamma is ``[H]`` or ``[1, H]``, of a float dtype."""
    shape = tuple(gamma.shape)
    assert shape == (width,) or shape == (1, width), (
        f"{name}: expected shape [{width}] or [1, {width}] (H of hidden), got {list(shape)}"
    )
