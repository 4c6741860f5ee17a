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

from .common import SCALE_BYTES, fp8_dtype, fp8_max, share
from .rms_norm_quant import DtypeMode

MAX_T = 65536
"""Most rows of one call."""
MAX_I = 28672
"""Widest row of the result."""

SCALE_FLOOR = 1e-6
NAN_CODE = 0x7F

CHUNK = 2048  # columns in flight together
GPSIMD_SHARE = 0.625  # of each chunk's products: GpSimdE's, the others are VectorE's
LOADS = 3  # chunks of gate and up in SBUF; 2 in fp32
SBUF_RESERVE = 1024  # bytes per partition for the tiles of one number per row


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
        work = _Work(gate_up.reshape((rows, 2 * width)), out.reshape((rows, out_width)), static_scale, ocp)
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


class _Numbers(nl.NKIObject):
    """What a tile knows of each of its rows, ``[128, 1]`` fp32 each.

    Attributes:
        peak: max|y|.
        scale: from the peak; finite in a row that holds NaN, too, if the hardware's maximum passes that over.
        inverse: 1 / scale.
        total: a sum over the row that is NaN exactly where y holds NaN or Inf.
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
    """One program's tiles of 128 rows, chunk by chunk of columns, and the buffers they use in turn.

    Args:
        source: ``[T, 2 I]`` in HBM.
        out: ``[T, I + 4]``, or ``[T, I]``, in HBM.
        static_scale: ``[128, 1]`` fp32 in HBM, or None.
        ocp: which FP8 the codes are.
    """

    def __init__(self, source, out, static_scale, ocp: bool):
        pmax = nl.tile_size.pmax
        self.source = source
        self.out = out
        self.width = source.shape[1] // 2
        self.static = static_scale != None
        self.fp8 = fp8_dtype(ocp)
        self.fp8_max = fp8_max(ocp)
        self.columns = min(self.width, CHUNK)
        self.chunks = (self.width + CHUNK - 1) // CHUNK
        self.by_gpsimd = max(1, int(self.columns * GPSIMD_SHARE))
        self.words = (self.width + SCALE_BYTES + 3) // 4

        spent = SBUF_RESERVE
        self.loads, self.codes, self.silus, self.numbers, self.banks, self.products = [], [], [], [], [], []
        loads, item = (2, 4) if source.dtype == nl.float32 else (LOADS, 2)
        for _ in range(loads):
            self.loads.append(nl.ndarray((pmax, 2, self.columns), dtype=source.dtype, buffer=nl.sbuf))
            spent += 2 * self.columns * item
        for _ in range(2):
            self.codes.append(nl.ndarray((pmax, self.words * 4), dtype=nl.uint8, buffer=nl.sbuf))
            self.silus.append(nl.ndarray((pmax, self.by_gpsimd), dtype=nl.float32, buffer=nl.sbuf))
            self.numbers.append(_Numbers())
            spent += self.words * 4 + self.by_gpsimd * 4
        # Where an instruction that is run for its maximum or sum leaves its elements.
        self.unused = nl.ndarray((pmax, self.columns), dtype=nl.bfloat16, buffer=nl.sbuf)
        spent += self.columns * 2
        # A tile's products wait for its scale, while the next tile's come in: two tiles' where there is room,
        # and at least one chunk more than one tile's.
        fitting = (nl.tile_size.sbuf_fmax_bytes - spent) // (self.columns * 4)
        for _ in range(min(fitting, 2 * self.chunks)):
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
        pmax = nl.tile_size.pmax
        count = (last - first + pmax - 1) // pmax
        for i in range(count + 1):
            start, stop = first + i * pmax, min(first + (i + 1) * pmax, last)
            before = min(start, last) - (start - pmax)  # rows of the tile before this one
            for chunk in range(self.chunks):
                if i < count:
                    self.load(i, chunk, start, stop)
                    self.multiply(i, chunk, stop - start)
                    if chunk > 0:
                        self.find_peak(i, chunk - 1, stop - start)
                if i > 0:
                    self.encode(i - 1, chunk, before)
            if i < count:
                self.find_peak(i, self.chunks - 1, stop - start)
                self.find_scale(i, stop - start)
            if i > 0:
                self.finish(i - 1, before)
                self.store(i - 1, start - pmax, before)

    def columns_of(self, chunk: int):
        """Return columns ``start, stop`` of a chunk."""
        return chunk * CHUNK, min((chunk + 1) * CHUNK, self.width)

    def loaded(self, i: int, chunk: int):
        """``[128, 2, columns]``: gate and up of a chunk of tile i."""
        return self.loads[(i * self.chunks + chunk) % len(self.loads)]

    def product(self, i: int, chunk: int, rows: int):
        """``[rows, columns]`` fp32: y of a chunk of tile i."""
        start, stop = self.columns_of(chunk)
        return self.products[(i * self.chunks + chunk) % len(self.products)][0:rows, 0 : stop - start]

    def load(self, i: int, chunk: int, first: int, last: int):
        """Load a chunk of gate and of up of rows ``first <= t < last``."""
        start, stop = self.columns_of(chunk)
        nisa.dma_copy(
            dst=self.loaded(i, chunk)[0 : last - first, :, 0 : stop - start],
            src=self.source[first:last, :].reshape_dim(1, (2, self.width))[:, :, start:stop],
        )

    def multiply(self, i: int, chunk: int, rows: int):
        """``y = silu(gate) * up``: ScalarE, then GpSimdE for some columns and VectorE for the others.

        VectorE reads SiLU from PSUM: two fp32 operands take it half the time when one of them lies there.
        """
        start, stop = self.columns_of(chunk)
        n = stop - start
        gate, up = self.loaded(i, chunk)[0:rows, 0, :], self.loaded(i, chunk)[0:rows, 1, :]
        y = self.product(i, chunk, rows)
        split = n - int(n * GPSIMD_SHARE)
        if split < n:
            silu = self.silus[chunk % 2][0:rows, 0 : n - split]
            nisa.activation(dst=silu, op=nl.silu, data=gate[:, split:n], bias=self.zero[0:rows, :])
            nisa.tensor_tensor(
                dst=y[:, split:n], data1=silu, data2=up[:, split:n], op=nl.multiply, engine=nisa.engine.gpsimd
            )
        step = nl.tile_size.psum_bank_fmax
        for at in range(0, split, step):
            end = min(at + step, split)
            silu = self.banks[self.bank % len(self.banks)][0:rows, 0 : end - at]
            self.bank += 1
            nisa.activation(dst=silu, op=nl.silu, data=gate[:, at:end], bias=self.zero[0:rows, :])
            nisa.tensor_tensor(
                dst=y[:, at:end], data1=silu, data2=up[:, at:end], op=nl.multiply, engine=nisa.engine.vector
            )

    def find_peak(self, i: int, chunk: int, rows: int):
        """Take a chunk into max|y|; STATIC has no use for it."""
        if self.static:
            return
        y = self.product(i, chunk, rows)
        nisa.tensor_scalar_reduce(
            dst=self.unused[0:rows, 0 : y.shape[1]],
            data=y,
            op0=nl.abs,
            operand0=0.0,
            reduce_op=nl.maximum,
            reduce_res=self.numbers[i % 2].peak[0:rows, :] if chunk == self.chunks - 1 else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if chunk == 0 else nisa.reduce_cmd.reduce,
        )

    def find_scale(self, i: int, rows: int):
        """Set scale and inverse from the peak."""
        if self.static:
            return
        numbers = self.numbers[i % 2]
        nisa.tensor_scalar(
            dst=numbers.scale[0:rows, :],
            data=numbers.peak[0:rows, :],
            op0=nl.multiply,
            operand0=1.0 / self.fp8_max,
            op1=nl.maximum,
            operand1=SCALE_FLOOR,
        )
        nisa.reciprocal(dst=numbers.inverse[0:rows, :], data=numbers.scale[0:rows, :])

    def encode(self, i: int, chunk: int, rows: int):
        """Codes of a chunk, and its part of the row's total.

        Codes within ±R add up to a finite total. With STATIC they are clipped, and what hardware's minimum
        makes of NaN is not documented: the total is that of 0 * y.
        """
        start, stop = self.columns_of(chunk)
        y = self.product(i, chunk, rows)
        codes = self.codes[i % 2].view(self.fp8)[0:rows, start:stop]
        total = self.numbers[i % 2].total[0:rows, :] if chunk == self.chunks - 1 else None
        command = nisa.reduce_cmd.reset_reduce if chunk == 0 else nisa.reduce_cmd.reduce
        nisa.activation(
            dst=self.unused[0:rows, 0 : stop - start] if self.static else codes,
            op=nl.copy,
            data=y,
            bias=self.zero[0:rows, :],
            scale=0.0 if self.static else self.numbers[i % 2].inverse[0:rows, :],
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=command,
        )
        if self.static:
            nisa.tensor_scalar(
                dst=y,
                data=y,
                op0=nl.multiply,
                operand0=self.inverse[0:rows, :],
                op1=nl.minimum,
                operand1=self.fp8_max,
            )
            nisa.tensor_scalar(dst=codes, data=y, op0=nl.maximum, operand0=-self.fp8_max)

    def finish(self, i: int, rows: int):
        """Mark invalid rows: their codes are overwritten, their scale is NaN; put scales behind the codes."""
        numbers = self.numbers[i % 2]
        nisa.tensor_scalar(
            dst=numbers.marked[0:rows, :], data=numbers.total[0:rows, :], op0=nl.multiply, operand0=0.0
        )
        if not self.static:
            nisa.tensor_tensor(
                dst=numbers.marked[0:rows, :],
                data1=numbers.marked[0:rows, :],
                data2=numbers.scale[0:rows, :],
                op=nl.add,
            )
        nisa.tensor_tensor(
            dst=numbers.invalid[0:rows, :],
            data1=numbers.marked[0:rows, :],
            data2=numbers.marked[0:rows, :],
            op=nl.not_equal,
        )
        words = (self.width + 3) // 4
        nisa.tensor_copy_predicated(
            dst=self.codes[i % 2].view(nl.uint32)[0:rows, 0:words],
            src=self.fill.view(nl.uint32)[0:rows, :].broadcast(1, words),
            predicate=numbers.invalid[0:rows, :].broadcast(1, words),
        )
        if not self.static:
            nisa.tensor_copy(
                dst=self.codes[i % 2][0:rows, self.width : self.width + SCALE_BYTES],
                src=numbers.marked.view(nl.uint8)[0:rows, :],
                engine=nisa.engine.vector,
            )

    def store(self, i: int, first: int, rows: int):
        """Store a tile's packed rows, contiguous in HBM."""
        codes = self.codes[i % 2][0:rows, 0 : self.out.shape[1]]
        if self.out.dtype != nl.uint8:
            codes = codes.view(self.fp8)
        nisa.dma_copy(dst=self.out[first : first + rows, :], src=codes)
