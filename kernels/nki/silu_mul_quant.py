"""SiLU(gate) * up and FP8 quantization in one pass: what feeds a decoder layer's down projection.

Dimensions:
    T: rows (tokens), gate_up's outer dimensions collapsed
    I: intermediate size; gate is the first I columns of gate_up, up the others
    R: largest code value, 240 (NON_OCP, Trainium2) or 448 (OCP, Trainium3)

A row's numbers, all in fp32 (``vllm_neuron_rmsq.reference`` states them in torch)::

    y     = gate * sigmoid(gate) * up
    scale = max(max|y| / R, 1e-6)                   STATIC: scale is given
    code  = to_fp8(clip(y / scale, ±R))

docs/kernels/silu_mul_quant.md says how, why so, and what the hardware has yet to confirm.
"""

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator import nki
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .common import SCALE_BYTES, fp8_dtype, fp8_max, program_count, share
from .rms_norm_quant import DtypeMode

MAX_T = 65536
"""Most rows of one call."""
MAX_I = 28672
"""Widest row of the result."""

SCALE_FLOOR = 1e-6
NAN_CODE = 0x7F

CHUNK = 1024  # columns in flight together
GPSIMD_SHARE = 0.75  # of each chunk's products: GpSimdE's, the others are VectorE's
LOADS = 8  # chunks of gate and up in SBUF, where there is room
LEAST_PART = 64  # columns; an instruction takes no less time with fewer
SBUF_RESERVE = 1024  # bytes per partition for the tiles of one number per line


@nki.jit
def silu_mul_quant_kernel(
    gate_up: nl.NkiTensor, static_scale: nl.NkiTensor = None, dtype_mode: DtypeMode = DtypeMode.NON_OCP
) -> nl.NkiTensor:
    """Multiply up by SiLU of gate, quantize rows to FP8 and pack each with its scale.

    Runs without a grid or on a 1-D grid of programs, which share the rows as evenly as they divide.

    Args:
        gate_up: ``[..., 2 I]``, rank >= 2, in HBM; bf16, fp16 or fp32. T <= 65536, I <= 28672.
        static_scale: STATIC: ``[128, 1]`` fp32, the one scale on every partition. None: a scale for each row.
        dtype_mode: FP8 of the codes.

    Returns:
        ``[..., I + 4]`` FP8 in shared HBM, I codes and the fp32 scale; STATIC: ``[..., I]``. A row with NaN
        or Inf in y has a NaN scale and codes of 0; STATIC: codes of 0x7F.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    ocp = dtype_mode == DtypeMode.OCP
    return _silu_mul_quant(gate_up, static_scale, ocp, fp8_dtype(ocp))


@nki.jit
def silu_mul_quant_bytes_kernel(
    gate_up: nl.NkiTensor, static_scale: nl.NkiTensor = None, ocp: bool = False, digest: int = 0
) -> nl.NkiTensor:
    """:func:`silu_mul_quant_kernel` as a PyTorch graph calls it: tensors and numbers in, uint8 out.

    Args:
        gate_up: ``[..., 2 I]``.
        static_scale: ``[128, 1]`` fp32 is STATIC; None is a scale for each row.
        ocp: codes within ±448 (Trainium3) instead of ±240.
        digest: :func:`.digest.digest`; not read, it makes a changed kernel another one for compile caches.

    Returns:
        As :func:`silu_mul_quant_kernel`, in uint8.
    """
    return _silu_mul_quant(gate_up, static_scale, ocp, nl.uint8)


def _silu_mul_quant(gate_up, static_scale, ocp: bool, out_dtype):
    rows, width = _check(gate_up, static_scale)
    shape = tuple(gate_up.shape)
    out_width = width + SCALE_BYTES if static_scale == None else width
    out = nl.ndarray(shape[0 : len(shape) - 1] + (out_width,), dtype=out_dtype, buffer=nl.shared_hbm)
    first, last = share(rows)
    if first < last:
        parts = _parts((rows + program_count() - 1) // program_count(), width)
        source, target = gate_up.reshape((rows, 2 * width)), out.reshape((rows, out_width))
        work = _Work(source, target, parts, static_scale, ocp)
        work.run(first, last)
    return out


def _check(gate_up, static_scale):
    """Assert the limits; return (T, I)."""
    rank = len(gate_up.shape)
    assert rank >= 2, f"gate_up: expected rank >= 2, got {rank}"
    both = gate_up.shape[rank - 1]
    assert both % 2 == 0, f"gate_up: expected an even last dimension, gate then up, got {both}"
    rows, width = gate_up.size // both, both // 2
    assert width <= MAX_I, f"gate_up: expected I <= {MAX_I} (half of its last dimension), got {width}"
    assert rows <= MAX_T, f"gate_up: expected at most {MAX_T} rows, got {rows}"
    assert gate_up.dtype == nl.bfloat16 or gate_up.dtype == nl.float16 or gate_up.dtype == nl.float32, (
        f"gate_up: expected dtype bfloat16, float16 or float32, got {gate_up.dtype}"
    )
    if static_scale != None:
        assert tuple(static_scale.shape) == (nl.tile_size.pmax, 1), (
            f"static_scale: expected shape ({nl.tile_size.pmax}, 1), got {tuple(static_scale.shape)}"
        )
        assert static_scale.dtype == nl.float32, (
            f"static_scale: expected dtype float32, got {static_scale.dtype}"
        )
    return rows, width


def _parts(rows: int, width: int) -> int:
    """Return in how many parts, each on a partition of its own, a row is cut: more where rows are few."""
    parts = 1
    while (
        rows * parts * 2 <= nl.tile_size.pmax and width % (parts * 2) == 0 and width >= parts * 2 * LEAST_PART
    ):
        parts *= 2
    return parts


class _Numbers(nl.NKIObject):
    """What a tile knows of each of its lines, ``[128, 1]`` fp32 each; the same for all parts of a row.

    Attributes:
        peak: max|y|.
        scale: from the peak; finite in a row that holds NaN, too, if the hardware's maximum passes that over.
        inverse: 1 / scale.
        total: a sum that is NaN exactly where y holds NaN or Inf.
        marked: the scale, or NaN where total is.
        invalid: uint32, not 0 where it is NaN.
    """

    def __init__(self):
        shape = (nl.tile_size.pmax, 1)
        self.peak = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        self.scale = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        self.inverse = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        self.total = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        self.marked = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        self.invalid = nl.ndarray(shape, dtype=nl.uint32, buffer=nl.sbuf)


class _Work(nl.NKIObject):
    """One program's tiles of up to 128 lines, chunk by chunk of columns, and the buffers they use in turn.

    A line is what lies on one partition: a row or, where rows are few, one of its equal parts.

    Args:
        source: ``[T, 2 I]`` in HBM.
        out: ``[T, I + 4]``, or ``[T, I]``, in HBM.
        parts: lines of a row.
        static_scale: ``[128, 1]`` fp32 in HBM, or None.
        ocp: which FP8 the codes are.
    """

    def __init__(self, source, out, parts: int, static_scale, ocp: bool):
        pmax = nl.tile_size.pmax
        self.source = source
        self.out = out
        self.parts = parts
        self.width = source.shape[1] // 2 // parts  # columns of a line
        self.static = static_scale != None
        self.fp8 = fp8_dtype(ocp)
        self.fp8_max = fp8_max(ocp)
        self.columns = min(self.width, CHUNK)
        self.chunks = (self.width + CHUNK - 1) // CHUNK
        self.pitch = (self.width + SCALE_BYTES + 3) // 4 * 4
        self.loads, self.codes, self.silus, self.numbers, self.banks, self.products = [], [], [], [], [], []

        by_gpsimd = max(1, int(self.columns * GPSIMD_SHARE))
        for _ in range(2):
            self.codes.append(nl.ndarray((pmax, self.pitch), dtype=nl.uint8, buffer=nl.sbuf))
            self.silus.append(nl.ndarray((pmax, by_gpsimd), dtype=nl.float32, buffer=nl.sbuf))
            self.numbers.append(_Numbers())
        # Where an instruction that is run for its maximum or sum leaves its elements.
        self.unused = nl.ndarray((pmax, self.columns), dtype=nl.bfloat16, buffer=nl.sbuf)
        # A tile's products wait for its scale while the next tile's come in: two tiles' where there is room,
        # at least one chunk more than one tile's.
        room = nl.tile_size.sbuf_fmax_bytes - SBUF_RESERVE
        room -= 2 * self.pitch + 2 * by_gpsimd * 4 + self.columns * 2
        load_bytes = 2 * self.columns * (4 if source.dtype == nl.float32 else 2)
        product_bytes = self.columns * 4
        loads = max(1, min(LOADS, (room - (self.chunks + 1) * product_bytes) // load_bytes))
        for _ in range(loads):
            self.loads.append(nl.ndarray((pmax, 2, self.columns), dtype=source.dtype, buffer=nl.sbuf))
        for _ in range(min((room - loads * load_bytes) // product_bytes, 2 * self.chunks)):
            self.products.append(nl.ndarray((pmax, self.columns), dtype=nl.float32, buffer=nl.sbuf))
        for _ in range(nl.tile_size.psum_num_banks):
            bank = (pmax, nl.tile_size.psum_bank_fmax)
            self.banks.append(nl.ndarray(bank, dtype=nl.float32, buffer=nl.psum))
        self.bank = 0

        self.zero = nl.ndarray((pmax, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(self.zero, 0.0)
        self.fill = nl.ndarray((pmax, 4), dtype=nl.uint8, buffer=nl.sbuf)
        nisa.memset(self.fill, NAN_CODE if self.static else 0)
        self.inverse = nl.ndarray((pmax, 1), dtype=nl.float32, buffer=nl.sbuf)  # of the given scale
        if self.static:
            nisa.dma_copy(dst=self.inverse, src=static_scale)
            nisa.reciprocal(dst=self.inverse, data=self.inverse)
        if self.width % 4 != 0:
            for codes in self.codes:  # invalid rows are overwritten by the word
                nisa.memset(codes, 0)

    def run(self, first: int, last: int):
        """Rows ``first <= t < last``. While a tile is multiplied, the one before it is encoded."""
        step = nl.tile_size.pmax // self.parts
        count = (last - first + step - 1) // step
        for i in range(count + 1):
            start, stop = first + i * step, min(first + (i + 1) * step, last)
            lines = (stop - start) * self.parts
            before = (min(start, last) - (start - step)) * self.parts  # lines of the tile before this one
            for chunk in range(self.chunks):
                if i < count:
                    self.load(i, chunk, start, stop)
                    self.multiply(i, chunk, lines)
                    if chunk > 0:
                        self.find_peak(i, chunk - 1, lines)
                if i > 0:
                    self.encode(i - 1, chunk, before)
            if i < count:
                self.find_peak(i, self.chunks - 1, lines)
                self.find_scale(i, lines)
            if i > 0:
                self.finish(i - 1, before)
                self.store(i - 1, start - step, before)

    def columns_of(self, chunk: int):
        """Return columns ``start, stop`` of a chunk."""
        return chunk * CHUNK, min((chunk + 1) * CHUNK, self.width)

    def loaded(self, i: int, chunk: int):
        """``[128, 2, columns]``: gate and up of a chunk of tile i."""
        return self.loads[(i * self.chunks + chunk) % len(self.loads)]

    def product(self, i: int, chunk: int, lines: int):
        """``[lines, columns]`` fp32: y of a chunk of tile i."""
        start, stop = self.columns_of(chunk)
        return self.products[(i * self.chunks + chunk) % len(self.products)][0:lines, 0 : stop - start]

    def next_bank(self):
        """``[128, 512]`` fp32: the PSUM bank whose turn it is."""
        self.bank += 1
        return self.banks[(self.bank - 1) % len(self.banks)]

    def load(self, i: int, chunk: int, first: int, last: int):
        """Load a chunk of gate and of up of rows ``first <= t < last``."""
        start, stop = self.columns_of(chunk)
        lines = self.source[first:last, :].reshape_dim(1, (2, self.parts, self.width)).permute((0, 2, 1, 3))
        nisa.dma_copy(
            dst=self.loaded(i, chunk)[0 : (last - first) * self.parts, :, 0 : stop - start],
            src=lines[:, :, :, start:stop],
        )

    def multiply(self, i: int, chunk: int, lines: int):
        """``y = silu(gate) * up``: ScalarE, then GpSimdE for some columns and VectorE for the others.

        VectorE reads SiLU from PSUM: two fp32 operands take it half the time when one of them lies there.
        """
        start, stop = self.columns_of(chunk)
        n = stop - start
        gate, up = self.loaded(i, chunk)[0:lines, 0, :], self.loaded(i, chunk)[0:lines, 1, :]
        y = self.product(i, chunk, lines)
        split = n - int(n * GPSIMD_SHARE)
        if split < n:
            silu = self.silus[chunk % 2][0:lines, 0 : n - split]
            nisa.activation(dst=silu, op=nl.silu, data=gate[:, split:n], bias=self.zero[0:lines, :])
            nisa.tensor_tensor(
                dst=y[:, split:n], data1=silu, data2=up[:, split:n], op=nl.multiply, engine=nisa.engine.gpsimd
            )
        step = nl.tile_size.psum_bank_fmax
        for at in range(0, split, step):
            end = min(at + step, split)
            silu = self.next_bank()[0:lines, 0 : end - at]
            nisa.activation(dst=silu, op=nl.silu, data=gate[:, at:end], bias=self.zero[0:lines, :])
            nisa.tensor_tensor(
                dst=y[:, at:end], data1=silu, data2=up[:, at:end], op=nl.multiply, engine=nisa.engine.vector
            )

    def find_peak(self, i: int, chunk: int, lines: int):
        """Take a chunk into max|y|; STATIC has no use for it."""
        if self.static:
            return
        y = self.product(i, chunk, lines)
        nisa.tensor_scalar_reduce(
            dst=self.unused[0:lines, 0 : y.shape[1]],
            data=y,
            op0=nl.abs,
            operand0=0.0,
            reduce_op=nl.maximum,
            reduce_res=self.numbers[i % 2].peak[0:lines, :] if chunk == self.chunks - 1 else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if chunk == 0 else nisa.reduce_cmd.reduce,
        )

    def find_scale(self, i: int, lines: int):
        """Set scale and inverse from the peak."""
        if self.static:
            return
        numbers = self.numbers[i % 2]
        peak = numbers.peak[0:lines, :]
        self.join_parts(peak, nl.maximum)
        nisa.tensor_scalar(
            dst=numbers.scale[0:lines, :],
            data=peak,
            op0=nl.multiply,
            operand0=1.0 / self.fp8_max,
            op1=nl.maximum,
            operand1=SCALE_FLOOR,
        )
        nisa.reciprocal(dst=numbers.inverse[0:lines, :], data=numbers.scale[0:lines, :])

    def join_parts(self, column, op):
        """Reduce a number of each line, ``[lines, 1]`` fp32, over the parts of each row; all of them get it.

        Twice transposed by TensorE, which moves fp32 bit for bit.
        """
        if self.parts == 1:
            return
        lines, parts = column.shape[0], self.parts
        rows = lines // parts
        across = self.next_bank()[0:1, 0:lines]
        joined = nl.ndarray((1, rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        repeated = nl.ndarray((1, rows, parts), dtype=nl.float32, buffer=nl.sbuf)
        back = self.next_bank()[0:lines, 0:1]
        nisa.nc_transpose(dst=across, data=column, engine=nisa.engine.tensor)
        nisa.tensor_reduce(dst=joined, op=op, data=across.reshape_dim(1, (rows, parts)), axis=2)
        nisa.tensor_copy(dst=repeated, src=joined.broadcast(2, parts), engine=nisa.engine.vector)
        nisa.nc_transpose(dst=back, data=repeated.reshape((1, lines)), engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=column, src=back, engine=nisa.engine.vector)

    def encode(self, i: int, chunk: int, lines: int):
        """Codes of a chunk, and its part of the line's total.

        Codes within ±R add up to a finite total. With STATIC they are clipped, and what hardware's minimum
        makes of NaN is not documented: the total is that of 0 * y.
        """
        start, stop = self.columns_of(chunk)
        y = self.product(i, chunk, lines)
        codes = self.codes[i % 2].view(self.fp8)[0:lines, start:stop]
        nisa.activation(
            dst=self.unused[0:lines, 0 : stop - start] if self.static else codes,
            op=nl.copy,
            data=y,
            bias=self.zero[0:lines, :],
            scale=0.0 if self.static else self.numbers[i % 2].inverse[0:lines, :],
            reduce_op=nl.add,
            reduce_res=self.numbers[i % 2].total[0:lines, :] if chunk == self.chunks - 1 else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if chunk == 0 else nisa.reduce_cmd.reduce,
        )
        if self.static:
            nisa.tensor_scalar(
                dst=y,
                data=y,
                op0=nl.multiply,
                operand0=self.inverse[0:lines, :],
                op1=nl.minimum,
                operand1=self.fp8_max,
            )
            nisa.tensor_scalar(dst=codes, data=y, op0=nl.maximum, operand0=-self.fp8_max)

    def finish(self, i: int, lines: int):
        """Mark invalid rows: their codes are overwritten, their scale is NaN."""
        numbers = self.numbers[i % 2]
        total, marked = numbers.total[0:lines, :], numbers.marked[0:lines, :]
        self.join_parts(total, nl.add)
        nisa.tensor_scalar(dst=marked, data=total, op0=nl.multiply, operand0=0.0)
        if not self.static:
            nisa.tensor_tensor(dst=marked, data1=marked, data2=numbers.scale[0:lines, :], op=nl.add)
        invalid = numbers.invalid[0:lines, :]
        nisa.tensor_tensor(dst=invalid, data1=marked, data2=marked, op=nl.not_equal)
        words = (self.width + 3) // 4
        nisa.tensor_copy_predicated(
            dst=self.codes[i % 2].view(nl.uint32)[0:lines, 0:words],
            src=self.fill.view(nl.uint32)[0:lines, :].broadcast(1, words),
            predicate=invalid.broadcast(1, words),
        )

    def store(self, i: int, first: int, lines: int):
        """Store a tile's packed rows: contiguous in HBM, but that parts of a row leave its scale apart."""
        rows, width = lines // self.parts, self.width * self.parts
        out = self.out[first : first + rows, :]
        codes = self.codes[i % 2]
        scales = self.numbers[i % 2].marked.view(nl.uint8)
        if self.static or self.parts > 1:
            nisa.dma_copy(
                dst=out.view(nl.uint8)[:, 0:width].reshape_dim(1, (self.parts, self.width)),
                src=codes[0:lines, 0 : self.width],
            )
            if not self.static:
                nisa.dma_copy(
                    dst=out.view(nl.uint8)[:, width : width + SCALE_BYTES],
                    src=scales.slice(0, 0, lines, self.parts),
                )
            return
        nisa.tensor_copy(
            dst=codes[0:lines, width : width + SCALE_BYTES], src=scales[0:lines, :], engine=nisa.engine.vector
        )
        nisa.dma_copy(dst=out.view(nl.uint8), src=codes[0:lines, 0 : width + SCALE_BYTES])
