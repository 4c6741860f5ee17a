"""Fused RMSNorm + FP8 quantization: the API of NKI Library's ``rmsnorm_quant_kernel``, another schedule.

Dimensions:
    B, S: batch and sequence, collapsed with any other outer dimension into rows T
    H: hidden size, the dimension that is normalized and quantized
    P: 128, rows in a tile, one row to an SBUF partition
    R: largest code value, 240 (NON_OCP, Trainium2) or 448 (OCP, Trainium3)

**What is computed** (``vllm_neuron_rmsq.reference`` states it in torch)::

    x     = hidden [+ residual]
    y     = x * rsqrt(mean(x²) + eps) * gamma           NO_NORM: y = x
    y     = clip(y, ±lower_bound)                       only when lower_bound > 0
    scale = max(max|y| / R, 1e-6)                       STATIC: scale is given
    code  = to_fp8(clip(y / scale, ±R))

**HBM.** ``hidden [T, H]`` is read once, ``out [T, H + 4]`` written once: H codes and the row's fp32 scale in
the last four bytes of each row, so that one DMA of contiguous rows stores both. With a residual the DMA
engines read both tensors and add them on the way into SBUF (``dma_compute``, fp32).

**SBUF, per partition, H = 8192 in bf16.** Two of each, used in turn, so that one tile loads and stores while
another is computed: the input ``x`` (2 x 16 KiB; fp32 with a residual), the normalized values ``v`` in fp16
(2 x 16 KiB) and the packed rows (2 x 8 KiB). Once: gamma in fp16 (16 KiB), scratch for the absolute maximum
(4 KiB). At H = 16384 with a residual 204 of the 224 KiB, ``x`` then being there once. PSUM serves the
broadcast of gamma only, its 8 banks in rotation.

**Why fp16.** VectorE is two to four times as fast when every operand is a 16-bit float in SBUF. bf16 would
lose: 8 significant bits before a conversion that keeps 4 move 3 % of the codes, fp16's 11 bits 0.4 %. What
fp16 lacks is range, so the values are brought into it: a row times its rsqrt(mean square) lies within
±sqrt(H), gamma over the power of two above its largest magnitude (G) within ±1, and another power of two (C)
lifts the product to just below fp16's 65504, leaving 22 octaves under the codes' own. Rows and gammas of any
magnitude come out alike. For H <= 256 an instruction costs its minimum of 64 cycles in either mode, and
everything is fp32.

**Engine by engine**, cycles per tile of 128 rows (0.96 GHz on VectorE, 1.2 GHz on ScalarE):

========  ===============================================================  ==================
engine    work                                                             cycles
========  ===============================================================  ==================
DMA       hidden in, packed rows out; adds the residual                    3 H bytes per row
ScalarE   square x and sum: one instruction                                H
VectorE   v = x * rsqrt * C                       (4x mode)                H / 4
VectorE   v = v * gamma                           (2x mode)                H / 2
VectorE   |v| in pieces (4x), folded by maximum (2x)                       0.77 H
GpSimdE   everything of one number per row: eps, rsqrt, NaN news, q        -
GpSimdE   codes * 0 in rows that hold NaN, * 1 in others; 4 at a time      H / 2
ScalarE   code = to_fp8(v * q)                                             H
TensorE   gamma to all partitions, against ones; once per launch           -
========  ===============================================================  ==================

ScalarE: 2 H / 1.2 GHz = 13.7 us at H = 8192; VectorE: 1.53 H / 0.96 GHz = 13.0 us. The published schedule has
three full-width passes on VectorE, 3 H / 0.96 GHz = 25.6 us (scale and gamma, absolute maximum,
quantization). A model, not a measurement, and it rests on reading VectorE's published width, 512 16-bit
elements a cycle, as two products of two fp16 tiles per lane and cycle. If that mode only doubles
NeuronCore-v2's speed for fp16, the multiplication and the fold take twice as long and VectorE 22 us;
benchmarks/nki_cost.py prints both.

The maximum is folded rather than reduced because a reduction streams one fp16 element a cycle; ``maximum`` of
two fp16 tiles makes two. ``abs_max`` would save the |v| pass but is Trainium3's. rsqrt is
GpSimdE's: more precise than ScalarE's, valid beyond [2^-87, 2^97], and ScalarE need not reload its function
table between square and rsqrt in every tile. With a residual x is fp32 (the norm is of the unrounded sum),
the first VectorE pass slows to H, ScalarE takes 3/8 of it, GpSimdE rounds residual_out, and the DMA engines,
with 7 H bytes a row, are the bound. Each engine runs its instructions in program order; the loop therefore
issues the first half of tile i + 1 before the second half of tile i, and no engine waits for one row's scale.

**NaN and Inf.** What hardware makes of ``max(NaN, x)`` is not documented, so the maximum is not trusted with
the news: the mean square times its two rsqrts is NaN exactly when it, or gamma, is not finite, and 0 times
that is added to the scale. GpSimdE, with time to spare, multiplies the row's codes, as integers, by 0. With
STATIC there is no scale, and every code of the row becomes 0x7F, NaN in both FP8 formats. No instruction
mixes rows.

**Rounding.** Codes differ from the fp32 formula's by at most one step, on about 0.4 % of gaussian elements,
scales by at most 2^-9 relative (in the simulator: tests/kernels/nki). Where bf16 numbers make many exact
ties, as a gamma of ones can, fp32 noise decides them, in the formula as here, and a single row may differ in
4 %.

Pseudocode::

    G = power of two above max|gamma|;  g = fp16(gamma / G)           once, [128, H]
    for each tile of 128 rows:
        x    = load(hidden) [+ residual]
        ms   = sum((x / sqrt(H))²)
        r    = rsqrt(ms);  u = ms * r * rsqrt(ms + eps)                u: 1, or less where eps matters
        v    = fp16(fp16(x * r * C) * g)
        peak = max|v|
        w    = u * G / C                                               v * w = y
        s    = max(min(peak * w, lower_bound) / R, 1e-6)
        q    = w / s
        code = to_fp8(v * q)               with clipping: v = fp16(clip(v * q, ±R)); code = to_fp8(v)
        store(code, s + 0 * u)
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

MAX_B = 2
"""Largest batch of a ``[B, S, H]`` input."""
MAX_S = 32768
"""Longest sequence of a ``[B, S, H]`` input."""
MAX_H = 16384
"""Widest row."""

SCALE_BYTES = 4
SCALE_FLOOR = 1e-6
NAN_CODE = 0x7F
GAMMA_FLOOR = 1e-30  # a gamma of zeros is not divided by zero

FOLD = 1024  # columns of |v| folded into one another at a time
FP32_WIDTH = 256  # up to here the 16-bit modes of VectorE save nothing
GAMMA_CHUNK = 1024  # columns of gamma brought in at a time
RESIDUAL_CHUNK = 2048  # columns of residual_out rounded and stored at a time
SBUF_RESERVE = 2048  # bytes per partition for the tiles of one number per row


class NormType(Enum):
    """What happens before quantization."""

    NO_NORM = 0
    RMS_NORM = 1


class QuantizationType(Enum):
    """Where the dequantization scale comes from: given for all rows, or found for each."""

    STATIC = 1
    ROW = 2


class DtypeMode(Enum):
    """Which FP8 the codes are: Trainium2's float8_e4m3 (±240) or OCP's float8_e4m3fn (±448, Trainium3)."""

    NON_OCP = 0
    OCP = 1


@dataclass
class RmsNormQuantKernelArgs(nl.NKIObject):
    """Arguments of the kernel that are known when it is compiled.

    Attributes:
        lower_bound: >= 0; clip normalized values to ±lower_bound, 0 does not clip.
        norm_type: ``RMS_NORM`` or ``NO_NORM``.
        quantization_type: ``ROW`` or ``STATIC``.
        eps: >= 0, added to the mean square.

    Raises:
        AssertionError: a value is outside its range; the message names limit and value.
    """

    lower_bound: float = 0.0
    norm_type: NormType = NormType.RMS_NORM
    quantization_type: QuantizationType = QuantizationType.ROW
    eps: float = 1e-6

    def __post_init__(self):
        assert self.norm_type == NormType.RMS_NORM or self.norm_type == NormType.NO_NORM, (
            f"norm_type: expected NormType.RMS_NORM or NormType.NO_NORM, got {self.norm_type}"
        )
        assert (
            self.quantization_type == QuantizationType.ROW
            or self.quantization_type == QuantizationType.STATIC
        ), (
            "quantization_type: expected QuantizationType.ROW or QuantizationType.STATIC, "
            f"got {self.quantization_type}"
        )
        assert self.lower_bound >= 0, f"lower_bound: expected >= 0 (0 does not clip), got {self.lower_bound}"
        assert self.eps >= 0, f"eps: expected >= 0, got {self.eps}"

    def needs_rms_normalization(self):
        """Return whether RMS normalization is applied."""
        return self.norm_type == NormType.RMS_NORM

    def has_lower_bound(self):
        """Return whether normalized values are clipped."""
        return self.lower_bound > 0


@nki.jit
def rmsnorm_quant_kernel(
    hidden,
    ln_w,
    kargs,
    input_dequant_scale=None,
    pre_norm_gamma=None,
    residual=None,
    dtype_mode=DtypeMode.NON_OCP,
):
    """Normalize rows, quantize them to FP8 and pack each with its scale; see the module for how.

    Runs without a grid or on a 1-D grid of programs, which share the rows as evenly as they divide.

    Args:
        hidden: ``[B, S, H]``, or any rank >= 2, in HBM; bf16, fp16 or fp32. B <= 2, S <= 32768, H <= 16384;
        other
            ranks: at most B * S = 65536 rows.
        ln_w: gamma, ``[H]`` or ``[1, H]``; unused (may be None) with NO_NORM.
        kargs: :class:`RmsNormQuantKernelArgs`.
        input_dequant_scale: STATIC: ``[128, 1]`` fp32, the one scale on every partition.
        pre_norm_gamma: ``[H]`` or ``[1, H]``: RMSNorm hidden with this gamma before the residual is added.
        residual: like hidden.
        dtype_mode: FP8 of the codes.

    Returns:
        ``[..., H + 4]`` FP8 (STATIC: ``[..., H]``) in shared HBM; with a residual a pair of that and
        hidden + residual, rounded to hidden's dtype.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    return _rmsnorm_quant(
        hidden, ln_w, kargs, input_dequant_scale, pre_norm_gamma, residual, dtype_mode, _fp8(dtype_mode)
    )


@nki.jit
def rmsnorm_quant_bytes_kernel(
    hidden, ln_w=None, residual=None, input_dequant_scale=None, eps=1e-6, lower_bound=0.0, ocp=False
):
    """:func:`rmsnorm_quant_kernel` as a PyTorch graph calls it: tensors and numbers in, uint8 out.

    uint8 because a graph for Trainium2 may not hold a ``float8_e4m3fn`` tensor, the one 8-bit float of that
    layout PyTorch has.

    Args:
        hidden: ``[..., H]``.
        ln_w: gamma, ``[H]``; None is NO_NORM.
        residual: like hidden, or None.
        input_dequant_scale: ``[128, 1]`` fp32 is STATIC; None is ROW.
        eps: added to the mean square.
        lower_bound: clip normalized values to ±lower_bound; 0 does not clip.
        ocp: codes within ±448 (Trainium3) instead of ±240.

    Returns:
        As :func:`rmsnorm_quant_kernel`, in uint8.
    """
    kargs = RmsNormQuantKernelArgs(
        lower_bound,
        NormType.NO_NORM if ln_w == None else NormType.RMS_NORM,
        QuantizationType.ROW if input_dequant_scale == None else QuantizationType.STATIC,
        eps,
    )
    dtype_mode = DtypeMode.OCP if ocp else DtypeMode.NON_OCP
    return _rmsnorm_quant(hidden, ln_w, kargs, input_dequant_scale, None, residual, dtype_mode, nl.uint8)


def _fp8(dtype_mode):
    if dtype_mode == DtypeMode.OCP:
        return nl.float8_e4m3fn
    return nl.float8_e4m3


def _fp8_max(dtype_mode):
    if dtype_mode == DtypeMode.OCP:
        return 448.0
    return 240.0


def _bytes_of(dtype):
    if dtype == nl.float32:
        return 4
    return 2


def _check(hidden, ln_w, kargs, input_dequant_scale, pre_norm_gamma, residual, dtype_mode):
    """Assert the limits; return (rows, H)."""
    rank = len(hidden.shape)
    assert rank >= 2, f"hidden: expected rank >= 2, got {rank}"
    width = hidden.shape[rank - 1]
    rows = hidden.size // width
    assert width <= MAX_H, f"hidden: expected H <= {MAX_H}, got {width}"
    if rank == 3:
        assert hidden.shape[0] <= MAX_B, f"hidden: expected B <= {MAX_B}, got {hidden.shape[0]}"
        assert hidden.shape[1] <= MAX_S, f"hidden: expected S <= {MAX_S}, got {hidden.shape[1]}"
    else:
        assert rows <= MAX_B * MAX_S, f"hidden: expected at most {MAX_B * MAX_S} rows, got {rows}"
    assert hidden.dtype == nl.bfloat16 or hidden.dtype == nl.float16 or hidden.dtype == nl.float32, (
        f"hidden: expected dtype bfloat16, float16 or float32, got {hidden.dtype}"
    )
    if kargs.needs_rms_normalization():
        _check_gamma("ln_w", ln_w, width)
    if pre_norm_gamma != None:
        _check_gamma("pre_norm_gamma", pre_norm_gamma, width)
    if residual != None:
        assert tuple(residual.shape) == tuple(hidden.shape), (
            f"residual: expected shape {tuple(hidden.shape)} (hidden's), got {tuple(residual.shape)}"
        )
        assert residual.dtype == hidden.dtype, (
            f"residual: expected dtype {hidden.dtype} (hidden's), got {residual.dtype}"
        )
    if kargs.quantization_type == QuantizationType.STATIC:
        assert input_dequant_scale != None, "input_dequant_scale: expected [128, 1] (STATIC), got None"
        assert tuple(input_dequant_scale.shape) == (nl.tile_size.pmax, 1), (
            f"input_dequant_scale: expected shape ({nl.tile_size.pmax}, 1), "
            f"got {tuple(input_dequant_scale.shape)}"
        )
        assert input_dequant_scale.dtype == nl.float32, (
            f"input_dequant_scale: expected dtype float32, got {input_dequant_scale.dtype}"
        )
    assert dtype_mode == DtypeMode.NON_OCP or dtype_mode == DtypeMode.OCP, (
        f"dtype_mode: expected DtypeMode.NON_OCP or DtypeMode.OCP, got {dtype_mode}"
    )
    assert nl.program_ndim() <= 1, f"grid: expected none or one dimension, got {nl.program_ndim()}"
    programs = nl.num_programs()
    assert rows >= programs, f"hidden: expected at least {programs} rows, one per program, got {rows}"
    return rows, width


def _check_gamma(name, gamma, width):
    assert gamma != None, f"{name}: expected shape [{width}] or [1, {width}], got None"
    shape = tuple(gamma.shape)
    assert shape == (width,) or shape == (1, width), (
        f"{name}: expected shape [{width}] or [1, {width}] (H of hidden), got {list(shape)}"
    )


# Columns of a tile's numbers, one number per row:
MEAN_SQUARE = 0
INVERSE = 1  # 1 / rms
RSQRT = 2  # the same with eps
W = 3  # times v is y
W_OVER_MAX = 4  # times max|v| is the scale
BAD = 5  # 0, or NaN for a row that is lost
PEAK = 6  # max|v|
FLOORED = 7  # the scale before it hears of NaN
SCALE = 8
Q = 9  # times v is the code
NUMBERS = 10
TINY = 1e-36  # added to the mean square of a row of zeros before its rsqrt


class _Tiles(nl.NKIObject):
    """What the tiles of a program share: sizes, constants, and the SBUF buffers they use in turn."""

    def __init__(self, width, x_dtype, kargs, dtype_mode):
        pmax = nl.tile_size.pmax
        self.width = width
        self.kargs = kargs
        self.fp8 = _fp8(dtype_mode)
        self.fp8_max = _fp8_max(dtype_mode)
        self.static = kargs.quantization_type == QuantizationType.STATIC
        self.clips = self.static or kargs.has_lower_bound()
        self.work_dtype = nl.float32 if width <= FP32_WIDTH else nl.float16
        self.lift = 1.0 if width <= FP32_WIDTH else _lift(width)
        self.pitch = (width + SCALE_BYTES + 3) // 4 * 4
        self.pre_gamma = None
        self.gamma = None
        self.psum = []
        self.constants = nl.ndarray((pmax, 8), dtype=nl.float32, buffer=nl.sbuf)
        self.eps = self.constants[:, 0:1]  # eps + 0 or, where gamma is not finite, NaN
        self.zero = self.constants[:, 1:2]
        self.tiny = self.constants[:, 7:8]
        self.w = self.constants[:, 2:3]  # G / C; 1 without a norm
        self.over_max = self.constants[:, 3:4]  # 1 / R
        self.static_q = self.constants[:, 4:5]
        # Codes lie within ±high: R, or the lower bound over the scale where that is less. A lower bound below
        # R * SCALE_FLOOR is below every scale that it does not determine, so with ROW this is known here.
        self.high = self.fp8_max
        if kargs.has_lower_bound():
            self.high = min(self.fp8_max, kargs.lower_bound / SCALE_FLOOR)
        self.low = -self.high
        nisa.memset(self.zero, 0.0)
        nisa.memset(self.tiny, TINY)
        # |v| in pieces; NO_NORM quantizes x itself
        self.peak_dtype = self.work_dtype if kargs.needs_rms_normalization() else x_dtype
        self.fold = []
        for _ in range(2):
            self.fold.append(nl.ndarray((pmax, min(width, FOLD)), dtype=self.peak_dtype, buffer=nl.sbuf))
        self.x_dtype = x_dtype
        self.x = []
        self.v = []
        self.codes = []
        self.stats = []
        self.rounded = []
        self.overlaps = False

    def allocate(self, spent, residual_dtype):
        """Make the buffers used in turn: two of each where ``spent`` bytes per partition leave room."""
        pmax = nl.tile_size.pmax
        x_bytes = self.width * _bytes_of(self.x_dtype)
        needs_v = self.kargs.needs_rms_normalization() or self.clips
        work_bytes = self.pitch + (self.width * _bytes_of(self.work_dtype) if needs_v else 0)
        if residual_dtype != None:
            spent += 2 * min(self.width, RESIDUAL_CHUNK) * _bytes_of(residual_dtype)
        room = nl.tile_size.sbuf_fmax_bytes - SBUF_RESERVE - spent
        work_count = 2 if x_bytes + 2 * work_bytes <= room else 1
        x_count = 2 if 2 * x_bytes + work_count * work_bytes <= room else 1
        # Half of a tile may wait for half of the next where that does not overwrite its input.
        self.overlaps = work_count == 2 and (self.kargs.needs_rms_normalization() or x_count == 2)
        for _ in range(x_count):
            self.x.append(nl.ndarray((pmax, self.width), dtype=self.x_dtype, buffer=nl.sbuf))
        for _ in range(work_count):
            if needs_v:
                self.v.append(nl.ndarray((pmax, self.width), dtype=self.work_dtype, buffer=nl.sbuf))
            self.codes.append(nl.ndarray((pmax, self.pitch), dtype=nl.uint8, buffer=nl.sbuf))
        for _ in range(2):
            self.stats.append(nl.ndarray((pmax, NUMBERS), dtype=nl.float32, buffer=nl.sbuf))
            if residual_dtype != None:
                chunk = (pmax, min(self.width, RESIDUAL_CHUNK))
                self.rounded.append(nl.ndarray(chunk, dtype=residual_dtype, buffer=nl.sbuf))


def _lift(width):
    """The power of two C that brings ±sqrt(H) to just below fp16's largest number."""
    root = 1
    while root * root < width:
        root *= 2
    return 32768.0 / root


def _rmsnorm_quant(hidden, ln_w, kargs, input_dequant_scale, pre_norm_gamma, residual, dtype_mode, out_dtype):
    rows, width = _check(hidden, ln_w, kargs, input_dequant_scale, pre_norm_gamma, residual, dtype_mode)
    static = kargs.quantization_type == QuantizationType.STATIC
    out_width = width if static else width + SCALE_BYTES
    shape = tuple(hidden.shape)
    out = nl.ndarray(shape[0 : len(shape) - 1] + (out_width,), dtype=out_dtype, buffer=nl.shared_hbm)
    residual_out = None
    if residual != None:
        residual_out = nl.ndarray(shape, dtype=hidden.dtype, buffer=nl.shared_hbm)

    # A sum is normalized before it is rounded: fp32, also for the first of two norms.
    x_dtype = hidden.dtype
    if residual != None or pre_norm_gamma != None:
        x_dtype = nl.float32
    tiles = _Tiles(width, x_dtype, kargs, dtype_mode)
    _prepare_constants(tiles, ln_w, pre_norm_gamma, input_dequant_scale)
    spent = 2 * min(width, FOLD) * _bytes_of(tiles.peak_dtype)
    if tiles.gamma != None:
        spent += width * _bytes_of(tiles.work_dtype)
    if pre_norm_gamma != None:
        spent += width * _bytes_of(pre_norm_gamma.dtype)
    rounds = residual != None and hidden.dtype != nl.float32
    tiles.allocate(spent, hidden.dtype if rounds else None)

    # This program's share of the rows, and two tiles in flight.
    programs, program = nl.num_programs(), nl.program_id(0)
    each, extra = rows // programs, rows % programs
    first = program * each + min(program, extra)
    last = first + each + (1 if program < extra else 0)
    source = hidden.reshape((rows, width))
    addend, total = None, None
    if residual_out != None:
        addend, total = residual.reshape((rows, width)), residual_out.reshape((rows, width))
    target = out.reshape((rows, out_width))
    pmax = nl.tile_size.pmax
    count = (last - first + pmax - 1) // pmax
    behind = 1 if tiles.overlaps else 0
    for i in range(count + behind):
        if i < count:
            start, stop = first + i * pmax, min(first + (i + 1) * pmax, last)
            _load(tiles, i, stop - start, source, addend, total, start)
            _normalize(tiles, i, stop - start)
        j = i - behind
        if j >= 0:
            start, stop = first + j * pmax, min(first + (j + 1) * pmax, last)
            _quantize(tiles, j, stop - start)
            codes = tiles.codes[j % len(tiles.codes)][0 : stop - start, 0:out_width]
            if out_dtype != nl.uint8:
                codes = codes.view(out_dtype)
            nisa.dma_copy(dst=target[start:stop, :], src=codes)
    if residual == None:
        return out
    return out, residual_out


def _prepare_constants(tiles, ln_w, pre_norm_gamma, input_dequant_scale):
    """Gamma on all partitions, and the numbers that are the same for every row."""
    pmax = nl.tile_size.pmax
    kargs = tiles.kargs
    if kargs.needs_rms_normalization() or pre_norm_gamma != None:
        for _ in range(nl.tile_size.psum_num_banks):
            bank = (pmax, nl.tile_size.psum_bank_fmax)
            tiles.psum.append(nl.ndarray(bank, dtype=nl.float32, buffer=nl.psum))
        nisa.memset(tiles.eps, kargs.eps)
    if pre_norm_gamma != None:
        tiles.pre_gamma = nl.ndarray((pmax, tiles.width), dtype=pre_norm_gamma.dtype, buffer=nl.sbuf)
        _broadcast_gamma(tiles, tiles.pre_gamma, pre_norm_gamma, 1.0)
    if kargs.needs_rms_normalization():
        inverse = _measure_gamma(tiles, ln_w)
        tiles.gamma = nl.ndarray((pmax, tiles.width), dtype=tiles.work_dtype, buffer=nl.sbuf)
        _broadcast_gamma(tiles, tiles.gamma, ln_w, inverse)
    else:
        nisa.memset(tiles.w, 1.0)
    nisa.memset(tiles.over_max, 1.0 / tiles.fp8_max)
    if tiles.static:
        nisa.dma_copy(dst=tiles.static_q, src=input_dequant_scale)
        nisa.reciprocal(dst=tiles.static_q, data=tiles.static_q)
        if kargs.has_lower_bound():
            tiles.high, tiles.low = tiles.constants[:, 5:6], tiles.constants[:, 6:7]
            nisa.tensor_scalar(
                dst=tiles.high,
                data=tiles.static_q,
                op0=nl.multiply,
                operand0=kargs.lower_bound,
                op1=nl.minimum,
                operand1=tiles.fp8_max,
            )
            nisa.tensor_scalar(dst=tiles.low, data=tiles.high, op0=nl.multiply, operand0=-1.0)


def _measure_gamma(tiles, ln_w):
    """Find G, the power of two above max|gamma|; set w and eps; return 1 / G, ``[128, 1]``.

    A power of two because dividing by it keeps every bit of a bf16 gamma: a row of equal numbers then has
    exact products, and codes that are ties in fp32 are ties here.
    """
    pmax = nl.tile_size.pmax
    spread = 1  # partitions: the largest power of two that divides H
    while spread < pmax and tiles.width % (2 * spread) == 0:
        spread *= 2
    each = tiles.width // spread
    piece = nl.ndarray((spread, each), dtype=ln_w.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=piece, src=ln_w.reshape((spread, each)))
    numbers = nl.ndarray((pmax, 4), dtype=nl.float32, buffer=nl.sbuf)
    ones = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    scratch = nl.ndarray((spread, min(each, FOLD)), dtype=nl.float32, buffer=nl.sbuf)

    # The largest magnitude: of each partition, then across partitions (transposed), then to all (ones).
    _reduce_abs_max(numbers[0:spread, 0:1], piece, scratch)
    row = tiles.psum[0][0:1, 0:spread]
    nisa.nc_transpose(dst=row, data=numbers[0:spread, 0:1], engine=nisa.engine.tensor)
    nisa.tensor_reduce(dst=numbers[0:1, 1:2], op=nl.maximum, data=row, axis=1)
    largest = tiles.psum[1][:, 0:1]
    nisa.nc_matmul(dst=largest, stationary=ones[0:1, :], moving=numbers[0:1, 1:2], accumulate=False)
    power = numbers[:, 2:3]
    nisa.tensor_scalar(dst=power, data=largest, op0=nl.maximum, operand0=GAMMA_FLOOR)
    # Its exponent alone is the power of two below; twice that is above.
    exponent = power.view(nl.int32)
    nisa.tensor_scalar(dst=exponent, data=exponent, op0=nl.bitwise_and, operand0=0x7F800000)
    nisa.tensor_scalar(dst=power, data=power, op0=nl.multiply, operand0=2.0)
    nisa.tensor_scalar(dst=tiles.w, data=power, op0=nl.multiply, operand0=1.0 / tiles.lift)
    nisa.reciprocal(dst=numbers[:, 3:4], data=power)

    # 0 * gamma sums to 0, or to NaN where an element is not finite: every row is to hear of that.
    nisa.activation(
        dst=piece,
        op=nl.copy,
        data=piece,
        scale=0.0,
        reduce_op=nl.add,
        reduce_res=numbers[0:spread, 0:1],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    news = tiles.psum[2][:, 0:1]
    nisa.nc_matmul(dst=news, stationary=ones[0:spread, :], moving=numbers[0:spread, 0:1], accumulate=False)
    nisa.tensor_scalar(dst=tiles.eps, data=news, op0=nl.add, operand0=tiles.kargs.eps)
    return numbers[:, 3:4]


def _broadcast_gamma(tiles, dst, gamma, factor):
    """Write ``gamma * factor`` to every partition: ones ``[1, 128]`` times gamma ``[1, n]``, bank after bank.

    VectorE empties three banks of four: ScalarE has less time to spare.
    """
    pmax, width = nl.tile_size.pmax, tiles.width
    step = nl.tile_size.psum_bank_fmax
    source = gamma.reshape((1, width))
    ones = nl.ndarray((1, pmax), dtype=gamma.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    pieces = []
    for _ in range(2):
        pieces.append(nl.ndarray((1, min(width, GAMMA_CHUNK)), dtype=gamma.dtype, buffer=nl.sbuf))
    bank = 0
    for start in range(0, width, GAMMA_CHUNK):
        size = min(GAMMA_CHUNK, width - start)
        piece = pieces[start // GAMMA_CHUNK % 2]
        nisa.dma_copy(dst=piece[:, 0:size], src=source[:, start : start + size])
        for at in range(0, size, step):
            n = min(step, size - at)
            psum = tiles.psum[bank % len(tiles.psum)][:, 0:n]
            nisa.nc_matmul(
                dst=psum,
                stationary=ones,
                moving=piece[:, at : at + n],
                is_stationary_onezero=True,
                accumulate=False,
            )
            out = dst[:, start + at : start + at + n]
            if bank % 4 == 3:
                nisa.activation(dst=out, op=nl.copy, data=psum, scale=factor)
            else:
                nisa.tensor_scalar(dst=out, data=psum, op0=nl.multiply, operand0=factor)
            bank += 1


def _load(tiles, i, rows, source, addend, total, start):
    """Bring tile i of hidden to SBUF as x, normalized a first time and the residual added if so asked."""
    x = tiles.x[i % len(tiles.x)][0:rows, :]
    hidden = source[start : start + rows, :]
    if tiles.pre_gamma != None:
        nisa.dma_copy(dst=x, src=hidden)
        _mean_square(tiles, i, rows, x)
        _rsqrt(tiles, i, rows, RSQRT, tiles.eps)
        nisa.scalar_tensor_tensor(
            dst=x,
            data=x,
            op0=nl.multiply,
            operand0=_number(tiles, i, rows, RSQRT),
            op1=nl.multiply,
            operand1=tiles.pre_gamma[0:rows, :],
        )
        hidden = x
    if addend != None:
        nisa.dma_compute(dst=x, srcs=[hidden, addend[start : start + rows, :]], reduce_op=nl.add)
        _store_sum(tiles, rows, x, total[start : start + rows, :])
    elif tiles.pre_gamma == None:
        nisa.dma_copy(dst=x, src=hidden)


def _store_sum(tiles, rows, x, total):
    """Store x rounded to hidden's dtype, rounded on GpSimdE in pieces."""
    if len(tiles.rounded) == 0:
        nisa.dma_copy(dst=total, src=x)
        return
    for start in range(0, tiles.width, RESIDUAL_CHUNK):
        stop = min(start + RESIDUAL_CHUNK, tiles.width)
        piece = tiles.rounded[start // RESIDUAL_CHUNK % 2][0:rows, 0 : stop - start]
        nisa.tensor_copy(dst=piece, src=x[:, start:stop], engine=nisa.engine.gpsimd)
        nisa.dma_copy(dst=total[:, start:stop], src=piece)


def _number(tiles, i, rows, column):
    """``[rows, 1]``: a column of tile i's numbers."""
    return tiles.stats[i % 2][0:rows, column : column + 1]


def _mean_square(tiles, i, rows, x):
    """Set MEAN_SQUARE to that of x; the squares themselves land in v, which is not yet in use."""
    nisa.activation(
        dst=_junk(tiles, i, rows),
        op=nl.square,
        data=x,
        scale=tiles.width**-0.5,
        reduce_op=nl.add,
        reduce_res=_number(tiles, i, rows, MEAN_SQUARE),
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


def _rsqrt(tiles, i, rows, column, addend):
    """Set ``column`` to rsqrt(mean square + addend)."""
    result = _number(tiles, i, rows, column)
    _on_gpsimd(result, _number(tiles, i, rows, MEAN_SQUARE), addend[0:rows, :], nl.add)
    nisa.tensor_scalar(dst=result, data=result, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd)


def _on_gpsimd(dst, data1, data2, op):
    """One number per row: GpSimdE has the time, VectorE and ScalarE have not."""
    nisa.tensor_tensor(dst=dst, data1=data1, data2=data2, op=op, engine=nisa.engine.gpsimd)


def _junk(tiles, i, rows):
    """Where an instruction run for its sum leaves its elements: a buffer of tile i that is written later."""
    if len(tiles.v) > 0:
        return tiles.v[i % len(tiles.v)][0:rows, :]
    return tiles.codes[i % len(tiles.codes)].view(tiles.fp8)[0:rows, 0 : tiles.width]


def _normalize(tiles, i, rows):
    """First half of tile i: v and, in ROW, its largest magnitude; BAD is 0, or NaN for a row that is lost."""
    x = tiles.x[i % len(tiles.x)][0:rows, :]
    bad, peak = _number(tiles, i, rows, BAD), _number(tiles, i, rows, PEAK)
    if not tiles.kargs.needs_rms_normalization():
        nisa.activation(
            dst=_junk(tiles, i, rows),
            op=nl.copy,
            data=x,
            scale=0.0,
            reduce_op=nl.add,
            reduce_res=bad,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        if not tiles.static:
            _abs_max(tiles, peak, x)
        return
    _mean_square(tiles, i, rows, x)
    # v has the row's own scale, without eps, or a row far below it would be lost in fp16; w makes up for
    # that: ms * (1 / rms) * rsqrt(ms + eps), which is finite exactly when the mean square and gamma are.
    inverse, rsqrt = _number(tiles, i, rows, INVERSE), _number(tiles, i, rows, RSQRT)
    w = _number(tiles, i, rows, W)
    _rsqrt(tiles, i, rows, INVERSE, tiles.tiny)
    _rsqrt(tiles, i, rows, RSQRT, tiles.eps)
    _on_gpsimd(w, _number(tiles, i, rows, MEAN_SQUARE), inverse, nl.multiply)
    _on_gpsimd(w, w, rsqrt, nl.multiply)
    _on_gpsimd(bad, w, tiles.zero[0:rows, :], nl.multiply)
    _on_gpsimd(w, w, tiles.w[0:rows, :], nl.multiply)
    _on_gpsimd(_number(tiles, i, rows, W_OVER_MAX), w, tiles.over_max[0:rows, :], nl.multiply)
    v = tiles.v[i % len(tiles.v)][0:rows, :]
    # fp32 takes VectorE's slow mode: ScalarE helps out.
    split = tiles.width if tiles.x_dtype != nl.float32 else tiles.width * 5 // 8
    if split > 0:
        nisa.tensor_scalar(
            dst=v[:, 0:split],
            data=x[:, 0:split],
            op0=nl.multiply,
            operand0=inverse,
            op1=nl.multiply,
            operand1=tiles.lift,
        )
    if split < tiles.width:
        lifted = _number(tiles, i, rows, FLOORED)
        nisa.tensor_scalar(dst=lifted, data=inverse, op0=nl.multiply, operand0=tiles.lift)
        nisa.activation(
            dst=v[:, split : tiles.width], op=nl.copy, data=x[:, split : tiles.width], scale=lifted
        )
    nisa.tensor_tensor(dst=v, data1=v, data2=tiles.gamma[0:rows, :], op=nl.multiply)
    if not tiles.static:
        _abs_max(tiles, peak, v)


def _abs_max(tiles, peak, data):
    """``peak [P, 1] = max|data|``, folding 16-bit data by maximum and reducing what is left."""
    rows, width = data.shape
    if tiles.peak_dtype == nl.float32:
        _reduce_abs_max(peak, data, tiles.fold[0][0:rows, :])
        return
    pieces = (width + FOLD - 1) // FOLD
    size = (width + pieces - 1) // pieces
    folded, piece = tiles.fold[0][0:rows, :], tiles.fold[1][0:rows, :]
    nisa.tensor_scalar(dst=folded[:, 0:size], data=data[:, 0:size], op0=nl.abs, operand0=0.0)
    for start in range(size, width, size):
        n = min(size, width - start)
        nisa.tensor_scalar(dst=piece[:, 0:n], data=data[:, start : start + n], op0=nl.abs, operand0=0.0)
        nisa.tensor_tensor(dst=folded[:, 0:n], data1=folded[:, 0:n], data2=piece[:, 0:n], op=nl.maximum)
    while size > 128:
        half = size // 2
        nisa.tensor_tensor(
            dst=folded[:, 0:half],
            data1=folded[:, 0:half],
            data2=folded[:, size - half : size],
            op=nl.maximum,
        )
        size -= half
    nisa.tensor_reduce(dst=peak, op=nl.maximum, data=folded[:, 0:size], axis=1)


def _reduce_abs_max(peak, data, scratch):
    """``peak [P, 1] = max|data|`` in fp32, as many columns at a time as ``scratch`` has."""
    width, step = data.shape[1], scratch.shape[1]
    for start in range(0, width, step):
        n = min(step, width - start)
        nisa.tensor_scalar_reduce(
            dst=scratch[:, 0:n],
            data=data[:, start : start + n],
            op0=nl.abs,
            operand0=0.0,
            reduce_op=nl.maximum,
            reduce_res=peak if start + n == width else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if start == 0 else nisa.reduce_cmd.reduce,
        )


def _quantize(tiles, i, rows):
    """Second half of tile i: scale, codes, packed rows; bad rows are made to say so."""
    width = tiles.width
    codes = tiles.codes[i % len(tiles.codes)]
    data = tiles.x[i % len(tiles.x)][0:rows, :]
    if tiles.kargs.needs_rms_normalization():
        data = tiles.v[i % len(tiles.v)][0:rows, :]
    q = _number(tiles, i, rows, Q)
    if tiles.static:
        _on_gpsimd(q, _w(tiles, i, rows), tiles.static_q[0:rows, :], nl.multiply)
    else:
        _find_scale(tiles, i, rows)
    if tiles.clips:
        # In code units, where fp16 has range and precision to spare.
        clipped = tiles.v[i % len(tiles.v)][0:rows, :]
        high, low = tiles.high, tiles.low
        if tiles.static and tiles.kargs.has_lower_bound():
            high, low = high[0:rows, :], low[0:rows, :]
        nisa.tensor_scalar(dst=clipped, data=data, op0=nl.multiply, operand0=q, op1=nl.minimum, operand1=high)
        nisa.tensor_scalar(dst=clipped, data=clipped, op0=nl.maximum, operand0=low)
        data, q = clipped, 1.0
    out = codes.view(tiles.fp8)[0:rows, 0:width]
    # Without a norm ScalarE and VectorE have the same work; with one VectorE has no time left.
    split = width if tiles.kargs.needs_rms_normalization() else (width + 1) // 2
    nisa.activation(dst=out[:, 0:split], op=nl.copy, data=data[:, 0:split], scale=q)
    if split < width:
        nisa.tensor_scalar(dst=out[:, split:width], data=data[:, split:width], op0=nl.multiply, operand0=q)
    if tiles.static:
        _spoil_bad_rows(tiles, i, rows, codes)
    else:
        _clear_bad_rows(tiles, i, rows, codes)
        nisa.tensor_copy(
            dst=codes[0:rows, width : width + SCALE_BYTES],
            src=_number(tiles, i, rows, SCALE).view(nl.uint8),
            engine=nisa.engine.gpsimd,
        )


def _w(tiles, i, rows):
    """What times v is y, row by row."""
    if tiles.kargs.needs_rms_normalization():
        return _number(tiles, i, rows, W)
    return tiles.w[0:rows, :]


def _find_scale(tiles, i, rows):
    """Set SCALE and Q from PEAK; Q takes the scale before it hears of NaN."""
    floored, q, peak = (
        _number(tiles, i, rows, FLOORED),
        _number(tiles, i, rows, Q),
        _number(tiles, i, rows, PEAK),
    )
    w_over_max = tiles.over_max[0:rows, :]
    if tiles.kargs.needs_rms_normalization():
        w_over_max = _number(tiles, i, rows, W_OVER_MAX)
    if tiles.kargs.has_lower_bound():
        nisa.tensor_scalar(
            dst=peak,
            data=peak,
            op0=nl.multiply,
            operand0=w_over_max,
            op1=nl.minimum,
            operand1=tiles.kargs.lower_bound / tiles.fp8_max,
        )
        nisa.tensor_scalar(dst=floored, data=peak, op0=nl.maximum, operand0=SCALE_FLOOR)
    else:
        nisa.tensor_scalar(
            dst=floored,
            data=peak,
            op0=nl.multiply,
            operand0=w_over_max,
            op1=nl.maximum,
            operand1=SCALE_FLOOR,
        )
    _on_gpsimd(_number(tiles, i, rows, SCALE), floored, _number(tiles, i, rows, BAD), nl.add)
    nisa.reciprocal(dst=q, data=floored)
    _on_gpsimd(q, q, _w(tiles, i, rows), nl.multiply)


def _clear_bad_rows(tiles, i, rows, codes):
    """Make every code of a row whose BAD is NaN zero: integers times 0 or 1, exact on GpSimdE."""
    n, dtype = _integers(tiles.width)
    bad = _number(tiles, i, rows, BAD)
    good = nl.ndarray((nl.tile_size.pmax, 1), dtype=dtype, buffer=nl.sbuf)[0:rows, :]
    _on_gpsimd(good, bad, bad, nl.equal)
    words = codes[0:rows, 0 : tiles.width].view(dtype)
    _on_gpsimd(words, words, good.broadcast(1, n), nl.multiply)


def _spoil_bad_rows(tiles, i, rows, codes):
    """Make every code of a row whose BAD is NaN the byte 0x7F."""
    n, dtype = _integers(tiles.width)
    bad = _number(tiles, i, rows, BAD)
    spoiled = nl.ndarray((nl.tile_size.pmax, 4), dtype=nl.uint8, buffer=nl.sbuf)
    which = nl.ndarray((nl.tile_size.pmax, 1), dtype=dtype, buffer=nl.sbuf)[0:rows, :]
    nisa.memset(spoiled, NAN_CODE)
    nisa.tensor_tensor(dst=which, data1=bad, data2=bad, op=nl.not_equal)
    nisa.tensor_copy_predicated(
        dst=codes[0:rows, 0 : tiles.width].view(dtype),
        src=spoiled.view(dtype)[0:rows, 0:1].broadcast(1, n),
        predicate=which.broadcast(1, n),
    )


def _integers(width):
    """``(n, dtype)``: a row of codes as the fewest integers."""
    if width % 4 == 0:
        return width // 4, nl.uint32
    if width % 2 == 0:
        return width // 2, nl.uint16
    return width, nl.uint8
