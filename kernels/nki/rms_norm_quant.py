"""Fused RMSNorm + FP8 quantization: the API of NKI Library's ``rmsnorm_quant_kernel``, another schedule.

Each row of ``hidden [T, H]`` becomes H FP8 codes and its fp32 scale, H + 4 bytes (R: the target's largest
FP8, 240 or 448; ``vllm_neuron_rmsq.reference`` states the same in torch)::

    x     = hidden [+ residual]
    y     = x * rsqrt(mean(x²) + eps) * gamma           NO_NORM: y = x
    y     = clip(y, ±lower_bound)                       only where there is a lower bound
    scale = max(max|y| / R, 1e-6)                       STATIC: scale is given
    code  = to_fp8(clip(y / scale, ±R))

docs/kernels/rms_norm_quant.md has the design: layout, engines, numbers, what differs from NKI Library.
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

from .common import SCALE_BYTES, fp8_dtype, fp8_max, program_count, share

MAX_B = 2
"""Largest batch of a ``[B, S, H]`` input."""
MAX_S = 32768
"""Longest sequence of a ``[B, S, H]`` input."""
MAX_H = 16384
"""Widest row."""

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

    def is_static_quant(self):
        """Return whether the dequantization scale is given."""
        return self.quantization_type == QuantizationType.STATIC

    def is_row_quant(self):
        """Return whether the dequantization scale is found for each row."""
        return self.quantization_type == QuantizationType.ROW


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
    """Normalize rows, quantize them to FP8 and pack each with its scale; see the module for what and how.

    Runs without a grid or on a 1-D grid of programs, which share the rows as evenly as they divide.

    Args:
        hidden: ``[B, S, H]``, or any rank >= 2, in HBM; bf16, fp16 or fp32. B <= 2, S <= 32768, H <= 16384;
            other ranks: at most B * S = 65536 rows.
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
    assert dtype_mode == DtypeMode.NON_OCP or dtype_mode == DtypeMode.OCP, (
        f"dtype_mode: expected DtypeMode.NON_OCP or DtypeMode.OCP, got {dtype_mode}"
    )
    ocp = dtype_mode == DtypeMode.OCP
    return run(hidden, ln_w, kargs, input_dequant_scale, pre_norm_gamma, residual, ocp, fp8_dtype(ocp))


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
    kargs = RmsNormQuantKernelArgs(
        lower_bound,
        NormType.NO_NORM if weight == None else NormType.RMS_NORM,
        QuantizationType.ROW if static_scale == None else QuantizationType.STATIC,
        eps,
    )
    return run(hidden, weight, kargs, static_scale, None, residual, ocp, nl.uint8)


def run(
    hidden: nl.NkiTensor,
    gamma: nl.NkiTensor,
    kargs: RmsNormQuantKernelArgs,
    static_scale: nl.NkiTensor,
    pre_gamma: nl.NkiTensor,
    residual: nl.NkiTensor,
    ocp: bool,
    out_dtype,
):
    """Check the arguments, make the results, and quantize; arguments and results as the entries have them."""
    check(hidden, gamma, kargs, static_scale, pre_gamma, residual)
    shape = tuple(hidden.shape)
    out_width = shape[len(shape) - 1]
    if kargs.is_row_quant():
        out_width += SCALE_BYTES
    out = nl.ndarray(shape[0 : len(shape) - 1] + (out_width,), dtype=out_dtype, buffer=nl.shared_hbm)
    residual_out = None
    if residual != None:
        residual_out = nl.ndarray(shape, dtype=hidden.dtype, buffer=nl.shared_hbm)
    norm = Norm(hidden, out, residual, residual_out, kargs, ocp, pre_gamma != None)
    prepare(norm, gamma, pre_gamma, static_scale)
    norm.allocate_tiles()
    norm.run()
    if residual == None:
        return out
    return out, residual_out


def check(
    hidden: nl.NkiTensor,
    gamma: nl.NkiTensor,
    kargs: RmsNormQuantKernelArgs,
    static_scale: nl.NkiTensor,
    pre_gamma: nl.NkiTensor,
    residual: nl.NkiTensor,
):
    """Assert the limits of the entries' arguments."""
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
    if kargs.is_static_quant():
        assert static_scale != None, "input_dequant_scale: expected [128, 1] (STATIC), got None"
        assert tuple(static_scale.shape) == (nl.tile_size.pmax, 1), (
            f"input_dequant_scale: expected shape ({nl.tile_size.pmax}, 1), got {tuple(static_scale.shape)}"
        )
        assert static_scale.dtype == nl.float32, (
            f"input_dequant_scale: expected dtype float32, got {static_scale.dtype}"
        )
    programs = program_count()
    assert rows >= programs, f"hidden: expected at least {programs} rows, one per program, got {rows}"


def check_gamma(name: str, gamma: nl.NkiTensor, width: int):
    """Assert that gamma is ``[H]`` or ``[1, H]``."""
    assert gamma != None, f"{name}: expected shape [{width}] or [1, {width}], got None"
    shape = tuple(gamma.shape)
    assert shape == (width,) or shape == (1, width), (
        f"{name}: expected shape [{width}] or [1, {width}] (H of hidden), got {list(shape)}"
    )


NUMBERS = 10  # of a tile, one number per row each
TINY = 1e-36  # added to the mean square of a row of zeros before its rsqrt


class Norm(nl.NKIObject):
    """One program's work: its rows, the numbers that hold for all of them, the buffers that tiles share.

    Attributes:
        hidden, residual: ``[T, H]`` in HBM, all rows of the launch; residual may be None.
        out: ``[T, H + 4]`` (STATIC: ``[T, H]``) in HBM.
        residual_out: ``[T, H]`` in HBM, or None.
        width: H.
        first, last: this program's rows, ``first <= row < last``.
        gamma, pre_gamma: ``[128, H]`` in SBUF, on every partition; None where there is no such norm.
        eps: ``[128, 1]``: eps or, where gamma is not finite, NaN.
        lift_inverse: ``[128, 1]``: what times the stored products, normalized by gamma's peak and lifted for
            fp16, is the product itself (1 without a norm).
        inverse_max: ``[128, 1]``: 1 / R.
        static_inverse: ``[128, 1]``: 1 / the given scale.
        high, low: codes lie between them; numbers or ``[128, 1]``.
        zero, tiny: ``[128, 1]``.
    """

    def __init__(self, hidden, out, residual, residual_out, kargs, ocp, pre_norm):
        pmax = nl.tile_size.pmax
        width = hidden.shape[len(hidden.shape) - 1]
        rows = hidden.size // width
        self.width = width
        self.hidden = hidden.reshape((rows, width))
        self.out = out.reshape((rows, out.size // rows))
        self.residual, self.residual_out = None, None
        if residual != None:
            self.residual = residual.reshape((rows, width))
            self.residual_out = residual_out.reshape((rows, width))
        self.first, self.last = share(rows)
        self.kargs = kargs
        self.normalizes = kargs.needs_rms_normalization()
        self.static = kargs.is_static_quant()
        self.clips = self.static or kargs.has_lower_bound()
        self.fp8 = fp8_dtype(ocp)
        self.fp8_max = fp8_max(ocp)
        # A sum is normalized before it is rounded: fp32, also for the first of two norms.
        self.input_dtype = hidden.dtype
        if residual != None or pre_norm:
            self.input_dtype = nl.float32
        self.product_dtype = nl.float32 if width <= FP32_WIDTH else nl.float16
        self.lift = 1.0 if width <= FP32_WIDTH else _lift(width)
        self.peak_dtype = self.product_dtype if self.normalizes else self.input_dtype
        self.gamma, self.pre_gamma = None, None
        self.psum = []

        constants = nl.ndarray((pmax, 8), dtype=nl.float32, buffer=nl.sbuf)
        self.eps = constants[:, 0:1]
        self.zero = constants[:, 1:2]
        self.lift_inverse = constants[:, 2:3]
        self.inverse_max = constants[:, 3:4]
        self.static_inverse = constants[:, 4:5]
        self.tiny = constants[:, 7:8]
        nisa.memset(self.zero, 0.0)
        nisa.memset(self.tiny, TINY)
        # Codes lie within ±high: R, or the lower bound over the scale where that is less. A lower bound below
        # R * SCALE_FLOOR is below every scale that it does not determine, so with ROW this is known here.
        self.high = self.fp8_max
        if kargs.has_lower_bound():
            self.high = min(self.fp8_max, kargs.lower_bound / SCALE_FLOOR)
        self.low = -self.high
        self.row_high, self.row_low = constants[:, 5:6], constants[:, 6:7]
        self.folds = []
        for _ in range(2):
            self.folds.append(nl.ndarray((pmax, min(width, FOLD)), dtype=self.peak_dtype, buffer=nl.sbuf))
        self.inputs, self.products, self.packed, self.numbers, self.rounded = [], [], [], [], []
        self.overlaps = False

    def allocate_tiles(self):
        """Make the buffers that tiles use in turn: two of each where SBUF has room, else one."""
        pmax = nl.tile_size.pmax
        spent = 2 * min(self.width, FOLD) * bytes_of(self.peak_dtype)
        if self.gamma != None:
            spent += self.width * bytes_of(self.product_dtype)
        if self.pre_gamma != None:
            spent += self.width * bytes_of(self.pre_gamma.dtype)
        chunk = min(self.width, RESIDUAL_CHUNK)
        rounds = self.residual != None and self.hidden.dtype != nl.float32
        if rounds:
            spent += 2 * chunk * bytes_of(self.hidden.dtype)
        pitch = (self.width + SCALE_BYTES + 3) // 4 * 4
        needs_products = self.normalizes or self.clips
        input_bytes = self.width * bytes_of(self.input_dtype)
        work_bytes = pitch + (self.width * bytes_of(self.product_dtype) if needs_products else 0)
        room = nl.tile_size.sbuf_fmax_bytes - SBUF_RESERVE - spent
        work_count = 2 if input_bytes + 2 * work_bytes <= room else 1
        input_count = 2 if 2 * input_bytes + work_count * work_bytes <= room else 1
        # Half of a tile may wait for half of the next where that does not overwrite its input.
        self.overlaps = work_count == 2 and (self.normalizes or input_count == 2)
        for _ in range(input_count):
            self.inputs.append(nl.ndarray((pmax, self.width), dtype=self.input_dtype, buffer=nl.sbuf))
        for _ in range(work_count):
            if needs_products:
                product = nl.ndarray((pmax, self.width), dtype=self.product_dtype, buffer=nl.sbuf)
                self.products.append(product)
            self.packed.append(nl.ndarray((pmax, pitch), dtype=nl.uint8, buffer=nl.sbuf))
        for _ in range(2):
            self.numbers.append(nl.ndarray((pmax, NUMBERS), dtype=nl.float32, buffer=nl.sbuf))
            if rounds:
                self.rounded.append(nl.ndarray((pmax, chunk), dtype=self.hidden.dtype, buffer=nl.sbuf))

    def tile_count(self) -> int:
        """Return how many tiles of up to 128 rows this program has."""
        return (self.last - self.first + nl.tile_size.pmax - 1) // nl.tile_size.pmax

    def tile(self, index: int):
        """Return the tile with this index."""
        return Tile(self, index)

    def run(self):
        """Quantize all rows. The second half of a tile is issued after the first half of the next one."""
        waiting = None
        for index in range(self.tile_count()):
            tile = self.tile(index)
            tile.load()
            tile.normalize()
            if self.overlaps:
                if waiting != None:
                    waiting.quantize()
                    waiting.store()
                waiting = tile
            else:
                tile.quantize()
                tile.store()
        if waiting != None:
            waiting.quantize()
            waiting.store()


class Tile(nl.NKIObject):
    """Up to 128 rows on their way through the kernel, one row to a partition; views of the Norm's buffers.

    Attributes:
        norm: the :class:`Norm` it belongs to.
        rows: how many rows it has.
        first, last: which ones, ``first <= row < last``.
        input: ``[rows, H]``: hidden, or hidden + residual in fp32.
        product: ``[rows, H]``: normalized by row and gamma, filling fp16; the input without norm and clip.
        packed: ``[rows, H + 4]`` uint8, codes and scale; its pitch is a multiple of four bytes.

    Every other attribute is ``[rows, 1]`` fp32, one number per row:
        mean_square; inverse_rms: its rsqrt; inverse_rms_eps: the same with eps.
        unit: what times the stored product (without a norm: the input) is the value to quantize.
        unit_over_max: unit / R.
        invalid: 0, or NaN for an invalid row, one that holds NaN or Inf.
        peak: the largest magnitude of the stored product.
        scale_if_valid: the scale, as it is where the row is valid; scale: NaN where it is not.
        code_factor: what times the stored product is the code.
    """

    def __init__(self, norm, index):
        self.norm = norm
        pmax = nl.tile_size.pmax
        self.first = norm.first + index * pmax
        self.last = min(self.first + pmax, norm.last)
        self.rows = self.last - self.first
        rows = self.rows
        self.input = norm.inputs[index % len(norm.inputs)][0:rows, :]
        self.product = self.input
        if len(norm.products) > 0:
            self.product = norm.products[index % len(norm.products)][0:rows, :]
        self.packed = norm.packed[index % len(norm.packed)][0:rows, :]
        self.codes = self.packed[:, 0 : norm.width]
        numbers = norm.numbers[index % len(norm.numbers)]
        self.mean_square = numbers[0:rows, 0:1]
        self.inverse_rms = numbers[0:rows, 1:2]
        self.inverse_rms_eps = numbers[0:rows, 2:3]
        self.unit = numbers[0:rows, 3:4] if norm.normalizes else norm.lift_inverse[0:rows, :]
        self.unit_over_max = numbers[0:rows, 4:5] if norm.normalizes else norm.inverse_max[0:rows, :]
        self.invalid = numbers[0:rows, 5:6]
        self.peak = numbers[0:rows, 6:7]
        self.scale_if_valid = numbers[0:rows, 7:8]
        self.scale = numbers[0:rows, 8:9]
        self.code_factor = numbers[0:rows, 9:10]

    def load(self):
        """Bring the rows to SBUF, normalized a first time and the residual added if so asked."""
        norm = self.norm
        source = norm.hidden[self.first : self.last, :]
        if norm.pre_gamma != None:
            nisa.dma_copy(dst=self.input, src=source)
            self._find_mean_square()
            self._rsqrt(self.inverse_rms_eps, norm.eps)
            nisa.scalar_tensor_tensor(
                dst=self.input,
                data=self.input,
                op0=nl.multiply,
                operand0=self.inverse_rms_eps,
                op1=nl.multiply,
                operand1=norm.pre_gamma[0 : self.rows, :],
            )
            source = self.input
        if norm.residual != None:
            addend = norm.residual[self.first : self.last, :]
            nisa.dma_compute(dst=self.input, srcs=[source, addend], reduce_op=nl.add)
            self._store_sum()
        elif norm.pre_gamma == None:
            nisa.dma_copy(dst=self.input, src=source)

    def _store_sum(self):
        """Store hidden + residual in hidden's dtype, rounded on GpSimdE in pieces."""
        norm = self.norm
        total = norm.residual_out[self.first : self.last, :]
        if len(norm.rounded) == 0:
            nisa.dma_copy(dst=total, src=self.input)
            return
        for start in range(0, norm.width, RESIDUAL_CHUNK):
            stop = min(start + RESIDUAL_CHUNK, norm.width)
            piece = norm.rounded[start // RESIDUAL_CHUNK % 2][0 : self.rows, 0 : stop - start]
            nisa.tensor_copy(dst=piece, src=self.input[:, start:stop], engine=nisa.engine.gpsimd)
            nisa.dma_copy(dst=total[:, start:stop], src=piece)

    def normalize(self):
        """First half: product, peak and, in ROW, the scale. No later instruction waits for a single row."""
        norm = self.norm
        if norm.normalizes:
            self._find_mean_square()
            self._find_units()
            self._multiply_by_gamma()
        else:
            # 0 * x sums to 0, or to NaN in an invalid row.
            sum_on_scalar(self._scratch(), self.input, nl.copy, 0.0, self.invalid)
        if not norm.static:
            self._find_peak(self.product if norm.normalizes else self.input)
            self._find_scale()

    def _scratch(self):
        """``[rows, H]``: where an instruction run for its sum leaves its elements; written again later."""
        if len(self.norm.products) > 0:
            return self.product
        return self.codes.view(self.norm.fp8)

    def _find_mean_square(self):
        sum_on_scalar(self._scratch(), self.input, nl.square, self.norm.width**-0.5, self.mean_square)

    def _rsqrt(self, dst, addend):
        """``dst [rows, 1] = rsqrt(mean_square + addend)``, addend ``[128, 1]``."""
        number_on_gpsimd(dst, self.mean_square, addend[0 : self.rows, :], nl.add)
        nisa.tensor_scalar(dst=dst, data=dst, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd)

    def _find_units(self):
        """Set the inverse rms, unit and invalid.

        The product has the row's own scale, without eps, or a row far below eps would be lost in fp16. The
        unit makes up for that: mean square * (1 / rms) * rsqrt(mean square + eps), finite exactly when the
        mean square and gamma are.
        """
        norm, rows = self.norm, self.rows
        self._rsqrt(self.inverse_rms, norm.tiny)
        self._rsqrt(self.inverse_rms_eps, norm.eps)
        number_on_gpsimd(self.unit, self.mean_square, self.inverse_rms, nl.multiply)
        number_on_gpsimd(self.unit, self.unit, self.inverse_rms_eps, nl.multiply)
        number_on_gpsimd(self.invalid, self.unit, norm.zero[0:rows, :], nl.multiply)
        number_on_gpsimd(self.unit, self.unit, norm.lift_inverse[0:rows, :], nl.multiply)
        number_on_gpsimd(self.unit_over_max, self.unit, norm.inverse_max[0:rows, :], nl.multiply)

    def _multiply_by_gamma(self):
        """``product = input * inverse_rms * lift * gamma``."""
        norm, rows, width = self.norm, self.rows, self.norm.width
        # fp32 takes VectorE's slow mode: ScalarE helps out.
        split = width if norm.input_dtype != nl.float32 else width * 5 // 8
        if split > 0:
            nisa.tensor_scalar(
                dst=self.product[:, 0:split],
                data=self.input[:, 0:split],
                op0=nl.multiply,
                operand0=self.inverse_rms,
                op1=nl.multiply,
                operand1=norm.lift,
            )
        if split < width:
            lifted = self.scale_if_valid  # not yet in use
            nisa.tensor_scalar(dst=lifted, data=self.inverse_rms, op0=nl.multiply, operand0=norm.lift)
            nisa.activation(
                dst=self.product[:, split:width], op=nl.copy, data=self.input[:, split:width], scale=lifted
            )
        nisa.tensor_tensor(dst=self.product, data1=self.product, data2=norm.gamma[0:rows, :], op=nl.multiply)

    def _find_peak(self, data):
        """``peak = max|data|``, data ``[rows, H]``: 16-bit data folded by maximum, what is left reduced."""
        norm, rows, width = self.norm, self.rows, self.norm.width
        folded, piece = norm.folds[0][0:rows, :], norm.folds[1][0:rows, :]
        if norm.peak_dtype == nl.float32:
            reduce_abs_max(self.peak, data, folded)
            return
        pieces = (width + FOLD - 1) // FOLD
        size = (width + pieces - 1) // pieces
        nisa.tensor_scalar(dst=folded[:, 0:size], data=data[:, 0:size], op0=nl.abs, operand0=0.0)
        for start in range(size, width, size):
            n = min(size, width - start)
            nisa.tensor_scalar(dst=piece[:, 0:n], data=data[:, start : start + n], op0=nl.abs, operand0=0.0)
            fold_by_maximum(folded[:, 0:n], folded[:, 0:n], piece[:, 0:n])
        while size > 128:
            half = size // 2
            fold_by_maximum(folded[:, 0:half], folded[:, 0:half], folded[:, size - half : size])
            size -= half
        nisa.tensor_reduce(dst=self.peak, op=nl.maximum, data=folded[:, 0:size], axis=1)

    def _find_scale(self):
        """Set scale and code_factor from peak; code_factor of an invalid row is that of a valid one."""
        norm = self.norm
        if norm.kargs.has_lower_bound():
            nisa.tensor_scalar(
                dst=self.peak,
                data=self.peak,
                op0=nl.multiply,
                operand0=self.unit_over_max,
                op1=nl.minimum,
                operand1=norm.kargs.lower_bound / norm.fp8_max,
            )
            nisa.tensor_scalar(dst=self.scale_if_valid, data=self.peak, op0=nl.maximum, operand0=SCALE_FLOOR)
        else:
            nisa.tensor_scalar(
                dst=self.scale_if_valid,
                data=self.peak,
                op0=nl.multiply,
                operand0=self.unit_over_max,
                op1=nl.maximum,
                operand1=SCALE_FLOOR,
            )
        number_on_gpsimd(self.scale, self.scale_if_valid, self.invalid, nl.add)
        nisa.reciprocal(dst=self.code_factor, data=self.scale_if_valid)
        number_on_gpsimd(self.code_factor, self.code_factor, self.unit, nl.multiply)

    def quantize(self):
        """Second half: the packed rows, with those of invalid rows as the contract has them."""
        norm, width = self.norm, self.norm.width
        data = self.product if norm.normalizes else self.input
        factor = self.code_factor
        if norm.static:
            number_on_gpsimd(factor, self.unit, norm.static_inverse[0 : self.rows, :], nl.multiply)
        if norm.clips:
            self._clip(data)
            data, factor = self.product, 1.0
        out = self.codes.view(norm.fp8)
        # Without a norm ScalarE and VectorE have the same work; with one VectorE has no time left.
        split = width if norm.normalizes else (width + 1) // 2
        nisa.activation(dst=out[:, 0:split], op=nl.copy, data=data[:, 0:split], scale=factor)
        if split < width:
            nisa.tensor_scalar(
                dst=out[:, split:width], data=data[:, split:width], op0=nl.multiply, operand0=factor
            )
        if norm.static:
            self._mark_invalid_rows()
        else:
            self._clear_invalid_rows()
            nisa.tensor_copy(
                dst=self.packed[:, width : width + SCALE_BYTES],
                src=self.scale.view(nl.uint8),
                engine=nisa.engine.gpsimd,
            )

    def _clip(self, data):
        """``product = clip(data * code_factor, low, high)``: in codes' units fp16 has precision to spare."""
        norm, rows = self.norm, self.rows
        high, low = norm.high, norm.low
        if norm.static and norm.kargs.has_lower_bound():
            high, low = norm.row_high[0:rows, :], norm.row_low[0:rows, :]
        nisa.tensor_scalar(
            dst=self.product,
            data=data,
            op0=nl.multiply,
            operand0=self.code_factor,
            op1=nl.minimum,
            operand1=high,
        )
        nisa.tensor_scalar(dst=self.product, data=self.product, op0=nl.maximum, operand0=low)

    def _clear_invalid_rows(self):
        """Make every code of an invalid row zero: integers times 0 or 1, exact on GpSimdE."""
        n, dtype = integers_of(self.norm.width)
        valid = nl.ndarray((nl.tile_size.pmax, 1), dtype=dtype, buffer=nl.sbuf)[0 : self.rows, :]
        number_on_gpsimd(valid, self.invalid, self.invalid, nl.equal)
        words = self.codes.view(dtype)
        number_on_gpsimd(words, words, valid.broadcast(1, n), nl.multiply)

    def _mark_invalid_rows(self):
        """Make every code of an invalid row the byte 0x7F, NaN in both FP8 formats."""
        n, dtype = integers_of(self.norm.width)
        nan_codes = nl.ndarray((nl.tile_size.pmax, 4), dtype=nl.uint8, buffer=nl.sbuf)
        which = nl.ndarray((nl.tile_size.pmax, 1), dtype=dtype, buffer=nl.sbuf)[0 : self.rows, :]
        nisa.memset(nan_codes, NAN_CODE)
        nisa.tensor_tensor(dst=which, data1=self.invalid, data2=self.invalid, op=nl.not_equal)
        nisa.tensor_copy_predicated(
            dst=self.codes.view(dtype),
            src=nan_codes.view(dtype)[0 : self.rows, 0:1].broadcast(1, n),
            predicate=which.broadcast(1, n),
        )

    def store(self):
        """Send the rows to HBM."""
        out = self.norm.out
        packed = self.packed[:, 0 : out.shape[1]]
        if out.dtype != nl.uint8:
            packed = packed.view(out.dtype)
        nisa.dma_copy(dst=out[self.first : self.last, :], src=packed)


def prepare(norm: Norm, gamma: nl.NkiTensor, pre_gamma: nl.NkiTensor, static_scale: nl.NkiTensor):
    """Bring to SBUF what is the same for every row.

    Args:
        norm: its constants are set here.
        gamma, pre_gamma: ``[H]`` or ``[1, H]`` in HBM; pre_gamma may be None.
        static_scale: ``[128, 1]`` fp32 in HBM, or None.
    """
    pmax = nl.tile_size.pmax
    kargs = norm.kargs
    if norm.normalizes or pre_gamma != None:
        for _ in range(nl.tile_size.psum_num_banks):
            bank = (pmax, nl.tile_size.psum_bank_fmax)
            norm.psum.append(nl.ndarray(bank, dtype=nl.float32, buffer=nl.psum))
        nisa.memset(norm.eps, kargs.eps)
    if pre_gamma != None:
        norm.pre_gamma = nl.ndarray((pmax, norm.width), dtype=pre_gamma.dtype, buffer=nl.sbuf)
        broadcast_gamma(norm, norm.pre_gamma, pre_gamma, 1.0)
    if norm.normalizes:
        inverse = measure_gamma(norm, gamma)
        norm.gamma = nl.ndarray((pmax, norm.width), dtype=norm.product_dtype, buffer=nl.sbuf)
        broadcast_gamma(norm, norm.gamma, gamma, inverse)
    else:
        nisa.memset(norm.lift_inverse, 1.0)
    nisa.memset(norm.inverse_max, 1.0 / norm.fp8_max)
    if norm.static:
        nisa.dma_copy(dst=norm.static_inverse, src=static_scale)
        nisa.reciprocal(dst=norm.static_inverse, data=norm.static_inverse)
        if kargs.has_lower_bound():
            nisa.tensor_scalar(
                dst=norm.row_high,
                data=norm.static_inverse,
                op0=nl.multiply,
                operand0=kargs.lower_bound,
                op1=nl.minimum,
                operand1=norm.fp8_max,
            )
            nisa.tensor_scalar(dst=norm.row_low, data=norm.row_high, op0=nl.multiply, operand0=-1.0)


def measure_gamma(norm: Norm, gamma: nl.NkiTensor) -> nl.NkiTensor:
    """Find G, the power of two above max|gamma|; set the norm's lift_inverse and eps.

    A power of two because dividing by it keeps every bit of a bf16 gamma: a row of equal numbers then has
    exact products, and codes that are ties in fp32 are ties here.

    Args:
        norm: the constants' owner.
        gamma: ``[H]`` or ``[1, H]`` in HBM.

    Returns:
        1 / G, ``[128, 1]`` fp32.
    """
    pmax = nl.tile_size.pmax
    spread = 1  # partitions: the largest power of two that divides H
    while spread < pmax and norm.width % (2 * spread) == 0:
        spread *= 2
    each = norm.width // spread
    piece = nl.ndarray((spread, each), dtype=gamma.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=piece, src=gamma.reshape((spread, each)))
    numbers = nl.ndarray((pmax, 4), dtype=nl.float32, buffer=nl.sbuf)
    ones = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    scratch = nl.ndarray((spread, min(each, FOLD)), dtype=nl.float32, buffer=nl.sbuf)

    # The largest magnitude: of each partition, then across partitions (transposed), then to all (ones).
    reduce_abs_max(numbers[0:spread, 0:1], piece, scratch)
    row = norm.psum[0][0:1, 0:spread]
    nisa.nc_transpose(dst=row, data=numbers[0:spread, 0:1], engine=nisa.engine.tensor)
    nisa.tensor_reduce(dst=numbers[0:1, 1:2], op=nl.maximum, data=row, axis=1)
    largest = norm.psum[1][:, 0:1]
    nisa.nc_matmul(dst=largest, stationary=ones[0:1, :], moving=numbers[0:1, 1:2], accumulate=False)
    power = numbers[:, 2:3]
    nisa.tensor_scalar(dst=power, data=largest, op0=nl.maximum, operand0=GAMMA_FLOOR)
    # Its exponent alone is the power of two below; twice that is above.
    exponent = power.view(nl.int32)
    nisa.tensor_scalar(dst=exponent, data=exponent, op0=nl.bitwise_and, operand0=0x7F800000)
    nisa.tensor_scalar(dst=power, data=power, op0=nl.multiply, operand0=2.0)
    nisa.tensor_scalar(dst=norm.lift_inverse, data=power, op0=nl.multiply, operand0=1.0 / norm.lift)
    nisa.reciprocal(dst=numbers[:, 3:4], data=power)

    # 0 * gamma sums to 0, or to NaN where an element is not finite, which makes every row invalid.
    sum_on_scalar(piece, piece, nl.copy, 0.0, numbers[0:spread, 0:1])
    total = norm.psum[2][:, 0:1]
    nisa.nc_matmul(dst=total, stationary=ones[0:spread, :], moving=numbers[0:spread, 0:1], accumulate=False)
    nisa.tensor_scalar(dst=norm.eps, data=total, op0=nl.add, operand0=norm.kargs.eps)
    return numbers[:, 3:4]


def broadcast_gamma(norm: Norm, dst: nl.NkiTensor, gamma: nl.NkiTensor, factor):
    """Write ``gamma * factor`` to every partition: ones ``[1, 128]`` times gamma ``[1, n]``, bank after bank.

    VectorE empties three banks of four: ScalarE has less time to spare.

    Args:
        norm: whose PSUM banks are used.
        dst: ``[128, H]`` in SBUF.
        gamma: ``[H]`` or ``[1, H]`` in HBM.
        factor: a number or ``[128, 1]`` fp32.
    """
    pmax, width = nl.tile_size.pmax, norm.width
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
            psum = norm.psum[bank % len(norm.psum)][:, 0:n]
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


def reduce_abs_max(dst: nl.NkiTensor, data: nl.NkiTensor, scratch: nl.NkiTensor):
    """``dst [P, 1] = max|data|``, data ``[P, n]``, in fp32, as many columns at a time as ``scratch`` has."""
    width, step = data.shape[1], scratch.shape[1]
    for start in range(0, width, step):
        n = min(step, width - start)
        nisa.tensor_scalar_reduce(
            dst=scratch[:, 0:n],
            data=data[:, start : start + n],
            op0=nl.abs,
            operand0=0.0,
            reduce_op=nl.maximum,
            reduce_res=dst if start + n == width else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if start == 0 else nisa.reduce_cmd.reduce,
        )


def sum_on_scalar(dst: nl.NkiTensor, data: nl.NkiTensor, op, scale: float, total: nl.NkiTensor):
    """``dst [P, n] = op(data * scale)`` and ``total [P, 1]`` its sum, on ScalarE."""
    nisa.activation(
        dst=dst,
        op=op,
        data=data,
        scale=scale,
        reduce_op=nl.add,
        reduce_res=total,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


def fold_by_maximum(dst: nl.NkiTensor, left: nl.NkiTensor, right: nl.NkiTensor):
    """``dst = max(left, right)``, all ``[P, n]``, on VectorE."""
    nisa.tensor_tensor(dst=dst, data1=left, data2=right, op=nl.maximum)


def number_on_gpsimd(dst: nl.NkiTensor, left: nl.NkiTensor, right: nl.NkiTensor, op):
    """``dst = op(left, right)`` on GpSimdE, which has the time that VectorE and ScalarE have not."""
    nisa.tensor_tensor(dst=dst, data1=left, data2=right, op=op, engine=nisa.engine.gpsimd)


def integers_of(width: int):
    """Return ``(n, dtype)``: a row of ``width`` codes as the fewest integers."""
    if width % 4 == 0:
        return width // 4, nl.uint32
    if width % 2 == 0:
        return width // 2, nl.uint16
    return width, nl.uint8


def bytes_of(dtype) -> int:
    """Return the bytes of an element of hidden, gamma or an intermediate result."""
    return 4 if dtype == nl.float32 else 2


def _lift(width: int) -> float:
    """Return the power of two that brings ±sqrt(H) to just below fp16's largest number."""
    root = 1
    while root * root < width:
        root *= 2
    return 32768.0 / root
