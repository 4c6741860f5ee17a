"""Packed FP8 rows times an FP8 weight: codes and row scales are read where the norm left them.

Dimensions:
    T: rows (tokens), 1 .. 32768 H: hidden size, the contraction; its codes go in pairs, Q = ceil(H / 2) of
    them N: output features J, P: the pairs in chunks, J = ceil(Q / 128) of them, P = ceil(Q / J) <= 128 pairs
    in each (fewer in the last) W: output features computed together, at most 512 (:func:`layout`)

**What is computed**, the sum in fp32::

    out[t, n] = (Σ_h code[t, h] * weight[n, h]) * scale[t] * weight_scale[n] + bias[n]

**Why pairs.** TensorE contracts over partitions, so activations, whose rows lie along H in HBM, must be
transposed on their way in. DMA transposes elements of 2 bytes or more. A pair of neighbouring codes is such
an element: ``[T, Q]`` pairs arrive as ``[P, J, T]`` pairs, that is as bytes ``[P, J, T, 2]``, one parity of h
beside the other. And two rows of the contraction on one partition is exactly what FP8 ``double_row``
multiplies in one pass: ``[P, 2, T]``, a strided view of those bytes, against ``[P, 2, W]`` of the weight.

**HBM.** ``packed [T, H + 4]``: each row's codes are read once by each program, its 4 bytes of scale beside
them. The weight is laid out once, at load, by :func:`prepack`: ``[P, J * 2 * N]`` bytes, for each block of W
features
and each partition p the ``[J, 2, W]`` bytes of all its chunks::

    column w0 * J * 2 + (j * 2 + i) * W + (n - w0)  of row p   =   weight[n, 2 * (j * P + p) + i]

so that a whole block of features, its entire contraction, is one DMA of up to 64 KiB contiguous per
partition. Chunks are of equal size rather than of 128 and a remainder: at H = 576 three of 96 partitions and
no padding. An odd H has one zero code appended. Programs of a grid share the blocks, hence N; their number is
even.

**SBUF, per partition, H = 8192.** Eight tiles of 128 rows transposed (64 KiB), two blocks of weight in turn
(2 x 32 KiB), their scales and bias in fp32 and the results on their way out (2 x 2 KiB each). At H = 28672 a
block is 292 features wide and two tiles of rows fit.

**Engine by engine**, for a block of W features and 128 rows:

========  ==================================================================================  ============
engine    work                                                                                time
========  ==================================================================================  ============
DMA       transposes rows, once per 1024; streams weights, once per 1024 rows; stores         -
TensorE   J matmuls [2P, 128] x [2P, W] into one PSUM bank, fp32                              J W / 2.4 ns
TensorE   weight_scale (and bias) to all partitions, against ones; once per block             4 W / 2.4 ns
VectorE   PSUM * scale[t] * weight_scale[n] -> out, one instruction                           W / 0.96 ns
ScalarE   the same instead where the weight has one scale for all                             W / 1.2 ns
========  ==================================================================================  ============

Results leave PSUM scaled and rounded; the 8 banks go in rotation, so TensorE starts on the next tile while
VectorE empties this one. At T <= 128 the weight stream bounds the kernel, which is why weights, and not
activations, are what is double-buffered; from about 256 rows on TensorE does.

A row with a NaN scale gives a row of NaN, and only that row: a row is a column of the stationary operand,
which no other row's results meet.

Pseudocode::

    for each 1024 rows:
        xT = dma_transpose(packed as 2-byte pairs)                   [P, J, 2, 1024]
        for each block of W features of this program:
            w = load(weight block)                                   [P, J, 2, W]
            for each 128 rows t:
                psum = Σ_j matmul(xT[:, j, :, t], w[:, j], double_row)
                store(psum * scale[t] * weight_scale + bias)
"""

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator import nki
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .rmsnorm_quant import DtypeMode

MAX_T = 32768
"""Most rows of one call."""
MAX_H = 65536
"""Longest contraction."""

OUT_DTYPES = {"bfloat16": nl.bfloat16, "float16": nl.float16, "float32": nl.float32}
"""Dtypes of the result, by name."""

SCALE_BYTES = 4
BLOCK_FEATURES = 512  # the moving operand's and a PSUM bank's width
BLOCK_BYTES = 65536  # of weight per partition, twice in SBUF
ROW_BYTES = 65536  # of transposed rows per partition
ROW_TILES = 8


def layout(out_features, in_features):
    """Return how a weight is laid out, a function of its shape alone.

    Args:
        out_features: N.
        in_features: H.

    Returns:
        ``(P, J, W)``: pairs of codes in a chunk, chunks, features in a block (fewer in the last one).
    """
    pairs = (in_features + 1) // 2
    chunks = (pairs + 127) // 128
    widest = min(BLOCK_FEATURES, BLOCK_BYTES // (2 * chunks))
    blocks = (out_features + widest - 1) // widest
    if out_features >= BLOCK_FEATURES // 2:
        blocks += blocks % 2  # for two programs
    return (pairs + chunks - 1) // chunks, chunks, (out_features + blocks - 1) // blocks


def prepacked_shape(out_features, in_features):
    """Return the shape of what :func:`prepack` returns for a weight ``[out_features, in_features]``."""
    partitions, chunks, _ = layout(out_features, in_features)
    return partitions, chunks * 2 * out_features


def prepack(weight):
    """Lay a weight out for :func:`packed_fp8_matmul_kernel`; call it once, at load.

    Args:
        weight: ``[N, H]`` torch.uint8, the FP8 codes; any device.

    Returns:
        ``[P, J * 2 * N]`` torch.uint8 (the module's text says where each code goes).
    """
    out_features, in_features = weight.shape
    partitions, chunks, width = layout(out_features, in_features)
    padded = weight.new_zeros((out_features, chunks * partitions * 2))
    padded[:, :in_features] = weight
    by_partition = padded.reshape(out_features, chunks, partitions, 2).permute(2, 1, 3, 0)
    packed = weight.new_empty(prepacked_shape(out_features, in_features))
    for start in range(0, out_features, width):
        stop = min(start + width, out_features)
        block = by_partition[..., start:stop].reshape(partitions, -1)
        packed[:, start * chunks * 2 : stop * chunks * 2] = block
    return packed


@nki.jit
def packed_fp8_matmul_kernel(
    packed, weight, weight_scale, bias=None, out_dtype=nl.bfloat16, dtype_mode=DtypeMode.NON_OCP
):
    """Multiply packed rows by a prepacked FP8 weight; see the module for how.

    Runs without a grid or on a 1-D grid of programs, which share the output features.

    Args:
        packed: ``[T, H + 4]`` uint8 or FP8, in HBM, 1 <= T <= 32768.
        weight: ``[P, J * 2 * N]`` uint8, what :func:`prepack` made of ``[N, H]``.
        weight_scale: ``[N]`` or ``[1]`` fp32.
        bias: ``[N]`` bf16, fp16 or fp32.
        out_dtype: bfloat16, float16 or float32.
        dtype_mode: which FP8 codes and weight are: NON_OCP float8_e4m3 (Trainium2: ±240), OCP
            float8_e4m3fn (Trainium3).

    Returns:
        ``[T, N]`` of out_dtype in shared HBM.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    rows, features, in_features = _check(packed, weight, weight_scale, bias)
    partitions, chunks, width = layout(features, in_features)
    fp8 = nl.float8_e4m3
    if dtype_mode == DtypeMode.OCP:
        fp8 = nl.float8_e4m3fn
    out = nl.ndarray((rows, features), dtype=out_dtype, buffer=nl.shared_hbm)
    pmax = nl.tile_size.pmax

    # This program's blocks of features.
    blocks = (features + width - 1) // width
    programs, program = nl.num_programs(), nl.program_id(0)
    each, extra = blocks // programs, blocks % programs
    first = program * each + min(program, extra)
    last = first + each + (1 if program < extra else 0)

    row_tiles = min(ROW_TILES, ROW_BYTES // (chunks * pmax * 2), (rows + pmax - 1) // pmax)
    transposed = []
    for _ in range(row_tiles):
        transposed.append(nl.ndarray((partitions, chunks, pmax), dtype=nl.uint16, buffer=nl.sbuf))
    staged = None
    if in_features % 2 == 1:
        staged = nl.ndarray((pmax, chunks * partitions * 2), dtype=nl.uint8, buffer=nl.sbuf)
        nisa.memset(staged[:, in_features : chunks * partitions * 2], 0)
    row_scale = nl.ndarray((pmax, row_tiles), dtype=nl.float32, buffer=nl.sbuf)
    one_scale = None
    if tuple(weight_scale.shape) == (1,) and features > 1:
        one_scale = nl.ndarray((pmax, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=one_scale, src=weight_scale.reshape((1, 1)).broadcast(0, pmax))
    weights, channel_scales, biases, results, psum = [], [], [], [], []
    for _ in range(2):
        weights.append(nl.ndarray((partitions, chunks * 2 * width), dtype=nl.uint8, buffer=nl.sbuf))
        results.append(nl.ndarray((pmax, width), dtype=out_dtype, buffer=nl.sbuf))
        if one_scale == None:
            channel_scales.append(nl.ndarray((pmax, width), dtype=nl.float32, buffer=nl.sbuf))
        if bias != None:
            biases.append(nl.ndarray((pmax, width), dtype=nl.float32, buffer=nl.sbuf))
    for _ in range(nl.tile_size.psum_num_banks):
        psum.append(nl.ndarray((pmax, nl.tile_size.psum_bank_fmax), dtype=nl.float32, buffer=nl.psum))

    turn = 0
    for block_start in range(0, rows, row_tiles * pmax):
        block_stop = min(block_start + row_tiles * pmax, rows)
        tiles = (block_stop - block_start + pmax - 1) // pmax
        for t in range(tiles):
            start = block_start + t * pmax
            stop = min(start + pmax, block_stop)
            _load_rows(transposed[t], staged, packed, start, stop, in_features)
            # The last four bytes of a row are its scale; a byte copy needs no alignment.
            nisa.dma_copy(
                dst=row_scale.view(nl.uint8)[0 : stop - start, t * SCALE_BYTES : (t + 1) * SCALE_BYTES],
                src=packed.view(nl.uint8)[start:stop, in_features : in_features + SCALE_BYTES],
            )
            if one_scale != None:
                scale = row_scale[0 : stop - start, t : t + 1]
                nisa.tensor_scalar(
                    dst=scale, data=scale, op0=nl.multiply, operand0=one_scale[0 : stop - start, :]
                )
        for block in range(first, last):
            n0 = block * width
            n = min(width, features - n0)
            held = weights[block % 2][:, 0 : chunks * 2 * n]
            nisa.dma_copy(dst=held, src=weight[:, n0 * chunks * 2 : (n0 + n) * chunks * 2])
            moving = held.view(fp8).reshape_dim(1, (chunks, 2, n))
            channel_scale, channel_bias = None, None
            if one_scale == None:
                channel_scale = channel_scales[block % 2][:, 0:n]
                _broadcast(channel_scale, weight_scale, n0, n, psum[turn % len(psum)])
                turn += 1
            if bias != None:
                channel_bias = biases[block % 2][:, 0:n]
                _broadcast(channel_bias, bias, n0, n, psum[turn % len(psum)])
                turn += 1
            for t in range(tiles):
                start = block_start + t * pmax
                stop = min(start + pmax, block_stop)
                bank = psum[turn % len(psum)][0 : stop - start, 0:n]
                _contract(bank, transposed[t].view(fp8), moving, stop - start, in_features)
                result = results[turn % 2][0 : stop - start, 0:n]
                _scale(result, bank, row_scale[0 : stop - start, t : t + 1], channel_scale, channel_bias)
                nisa.dma_copy(dst=out[start:stop, n0 : n0 + n], src=result)
                turn += 1
    return out


def _check(packed, weight, weight_scale, bias):
    """Assert the limits; return (T, N, H)."""
    assert len(packed.shape) == 2, f"packed: expected shape [T, H + {SCALE_BYTES}], got {list(packed.shape)}"
    rows, in_features = packed.shape[0], packed.shape[1] - SCALE_BYTES
    assert rows <= MAX_T, f"packed: expected T <= {MAX_T}, got {rows}"
    assert in_features >= 1 and in_features <= MAX_H, f"packed: expected 1 <= H <= {MAX_H}, got {in_features}"
    pairs = (in_features + 1) // 2
    chunks = (pairs + 127) // 128
    partitions = (pairs + chunks - 1) // chunks
    assert len(weight.shape) == 2 and weight.shape[0] == partitions and weight.shape[1] % (2 * chunks) == 0, (
        f"weight: expected the shape prepack() gives for H = {in_features}, "
        f"[{partitions}, {2 * chunks} * N], got {list(weight.shape)}"
    )
    assert weight.dtype == nl.uint8, f"weight: expected dtype uint8, got {weight.dtype}"
    features = weight.shape[1] // (2 * chunks)
    assert tuple(weight_scale.shape) == (features,) or tuple(weight_scale.shape) == (1,), (
        f"weight_scale: expected shape [{features}] or [1], got {list(weight_scale.shape)}"
    )
    assert weight_scale.dtype == nl.float32, f"weight_scale: expected dtype float32, got {weight_scale.dtype}"
    if bias != None:
        assert tuple(bias.shape) == (features,), f"bias: expected shape [{features}], got {list(bias.shape)}"
    assert nl.program_ndim() <= 1, f"grid: expected none or one dimension, got {nl.program_ndim()}"
    return rows, features, in_features


def _load_rows(dst, staged, packed, start, stop, in_features):
    """Transpose rows start..stop, pair by pair: ``dst [P, J, :rows]`` uint16.

    An odd H leaves no 2-byte view of the rows in HBM. They go by way of SBUF, where a zero makes the last
    pair.
    """
    partitions, chunks, _ = dst.shape
    rows = stop - start
    pairs = (in_features + 1) // 2
    if in_features % 2 == 1:
        codes = packed.view(nl.uint8)[start:stop, 0:in_features]
        nisa.dma_copy(dst=staged[0:rows, 0:in_features], src=codes)
        source = staged.view(nl.uint16)[0:rows, :]
        pairs = chunks * partitions
    else:
        source = packed.view(nl.uint16)[start:stop, :]
    whole = pairs // partitions
    nisa.dma_transpose(
        dst=dst[:, 0:whole, 0:rows],
        src=source[:, 0 : whole * partitions].reshape_dim(1, (whole, partitions)),
        axes=(2, 1, 0),
    )
    rest = pairs - whole * partitions
    if rest > 0:
        nisa.dma_transpose(
            dst=dst[0:rest, whole, 0:rows], src=source[:, whole * partitions : pairs], axes=(1, 0)
        )


def _contract(bank, codes, moving, rows, in_features):
    """``bank [rows, n] = Σ_j codes[:, j]ᵀ moving[:, j]``, two rows of the contraction on each partition."""
    partitions, chunks = moving.shape[0], moving.shape[1]
    pairs = (in_features + 1) // 2
    for j in range(chunks):
        used = min(partitions, pairs - j * partitions)
        stationary = codes[0:used, j, 0 : rows * 2].reshape_dim(1, (rows, 2)).permute((0, 2, 1))
        nisa.nc_matmul(
            dst=bank,
            stationary=stationary,
            moving=moving[0:used, j, :, :],
            accumulate=j > 0,
            perf_mode=nisa.matmul_perf_mode.double_row,
        )


def _broadcast(dst, vector, start, n, bank):
    """Write ``vector[start : start + n]`` to every partition of ``dst [128, n]``, against ones on TensorE."""
    pmax = nl.tile_size.pmax
    row = nl.ndarray((1, n), dtype=vector.dtype, buffer=nl.sbuf)
    ones = nl.ndarray((1, pmax), dtype=vector.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=row, src=vector.reshape((1, vector.shape[0]))[:, start : start + n])
    nisa.memset(ones, 1.0)
    nisa.nc_matmul(
        dst=bank[:, 0:n], stationary=ones, moving=row, is_stationary_onezero=True, accumulate=False
    )
    nisa.tensor_copy(dst=dst, src=bank[:, 0:n], engine=nisa.engine.vector)


def _scale(result, bank, row_scale, channel_scale, channel_bias):
    """``result = bank * row_scale [* channel_scale] [+ channel_bias]``, leaving PSUM."""
    rows = bank.shape[0]
    if channel_scale == None and channel_bias == None:
        nisa.activation(dst=result, op=nl.copy, data=bank, scale=row_scale)
        return
    if channel_scale == None:
        nisa.scalar_tensor_tensor(
            dst=result,
            data=bank,
            op0=nl.multiply,
            operand0=row_scale,
            op1=nl.add,
            operand1=channel_bias[0:rows, :],
        )
        return
    scaled = result
    if channel_bias != None:
        scaled = bank  # fp32, in place
    nisa.scalar_tensor_tensor(
        dst=scaled,
        data=bank,
        op0=nl.multiply,
        operand0=row_scale,
        op1=nl.multiply,
        operand1=channel_scale[0:rows, :],
    )
    if channel_bias != None:
        nisa.tensor_tensor(dst=result, data1=bank, data2=channel_bias[0:rows, :], op=nl.add)
