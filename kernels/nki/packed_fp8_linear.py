"""Packed FP8 rows times an FP8 weight: codes and row scales are read where the norm left them.

Dimensions:
    T: rows (tokens), 1 .. 32768
    H: input features, the contraction, 1 .. 65536
    N: output features
    P, J: pairs of neighbouring input features lie in J chunks of P <= 128, one pair to a partition
    W: output features computed together, a block; a multiple of 32 (N where there is but one), at most 512

The result is ``out[t, n] = (Σ_h code[t, h] * weight[n, h]) * scale[t] * weight_scale[n] + bias[n]``, the sum
in fp32. STATIC: rows are codes alone, ``scale`` is one for all. Block scales: one for each 128 x 128 of the
weight; the sum over each 128 of H is scaled by itself before it joins the others.
docs/kernels/packed_fp8_linear.md says how, why so, and what the hardware has yet to confirm.
"""

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator import nki
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .common import SCALE_BYTES, copy_to_partitions, fp8_dtype, share
from .rms_norm_quant import DtypeMode

MAX_T = 32768
"""Most rows of one call."""
MAX_H = 65536
"""Longest contraction."""
MAX_H_BLOCKS = 32768
"""Longest contraction with block scales."""

OUT_DTYPES = {"bfloat16": nl.bfloat16, "float16": nl.float16, "float32": nl.float32}
"""Dtypes of the result, by name."""

# Forms of an instruction that are safe by the documents; docs/kernels/packed_fp8_linear.md, last section.
DEINTERLEAVE = True  # False: TensorE reads pairs where the transpose left them, 2 bytes apart
LEAST_ROWS = 2  # 1: a single row is a double_row matmul of its own

BLOCK_FEATURES = 512  # the moving operand's and a PSUM bank's width
NARROW_BLOCK = 128  # features; TensorE is slow with few
BLOCK_BYTES = 49152  # of weight per partition and block
ALIGNMENT = 32  # features, and rows: distances between the halves of a double_row operand are multiples of it
WEIGHT_BYTES = 98304  # per partition for blocks of weight: all of this program's where they fit, else in turn
ROW_TILES = 8  # tiles of 128 rows that share one pass over the weight
PIECES = 4  # most parts in which rows and weight arrive: the first matmul need not wait for the last byte
FEW_ROWS_PIECES = 8  # with few rows, when what follows the last byte counts
PIECE_BYTES = 2048  # of weight per partition; below, issuing a transfer takes longer than its bytes
FEW_ROWS = 128  # up to here TensorE, which has the time, transposes rows; DMA is slow with few
LINE_BYTES = 512  # of few rows' codes on a partition: parts of a row on several, but no shorter than that
TRANSPOSE_BANKS = 2  # of PSUM, for TensorE's transposes
STAGES = 4, 16  # least and most pieces of rows on their way to TensorE ...
STAGE_BYTES = 16384  # ... and how many bytes per partition are worth it
RESULTS = 4  # tiles of results on their way out
SCALED = 128  # input and output features that share a scale, where blocks have scales
SBUF_RESERVE = 2048  # bytes per partition for the tiles of one number per row


def layout(out_features: int, in_features: int, blocks: bool = False) -> tuple[int, int, int]:
    """Return how a weight is laid out, a function of its shape and of the kind of its scales.

    Args:
        out_features: N.
        in_features: H.
        blocks: it has block scales: chunks are then whole pairs of blocks of H, each on 64 partitions.

    Returns:
        ``(P, J, W)``: pairs of codes in a chunk, chunks, features in a block (fewer in the last one).
    """
    pairs = (in_features + 1) // 2
    chunks = (pairs + 127) // 128
    step = SCALED if blocks else ALIGNMENT
    widest = min(BLOCK_FEATURES, BLOCK_BYTES // (2 * chunks) // step * step)
    width = min(widest, out_features)
    if out_features >= BLOCK_FEATURES // 2:
        # The width that leaves the one of two programs that has more features the least; of these the widest.
        least = out_features
        for narrower in range(0, max(0, widest - NARROW_BLOCK) + 1, step):
            candidate = widest - narrower
            count = (out_features + candidate - 1) // candidate
            larger_half = (count + 1) // 2 * candidate
            if larger_half < least:
                width, least = candidate, larger_half
    if blocks:
        return min(pairs, 128), chunks, width
    return (pairs + chunks - 1) // chunks, chunks, width


def prepacked_shape(out_features: int, in_features: int, blocks: bool = False) -> tuple[int, int]:
    """Return the shape of what :func:`prepack` returns for a weight ``[out_features, in_features]``."""
    partitions, chunks, _ = layout(out_features, in_features, blocks)
    return partitions, chunks * 2 * out_features


def prepack(weight, blocks: bool = False):
    """Lay a weight out for :func:`packed_fp8_linear_kernel`; call it once, at load.

    Args:
        weight: ``[N, H]`` torch.uint8, the FP8 codes; any device.
        blocks: whether it has block scales.

    Returns:
        ``[P, J * 2 * N]`` torch.uint8: block after block of W features, ``[J, 2, W]`` bytes on each
        partition. In a block that starts at feature n0, and has n of them,
        ``weight[n0 + k, 2 * (j * P + p) + i]`` is byte ``(j * 2 + i) * n + k`` of partition p.
    """
    out_features, in_features = weight.shape
    partitions, chunks, width = layout(out_features, in_features, blocks)
    padded = weight.new_zeros((out_features, chunks * partitions * 2))
    padded[:, :in_features] = weight
    by_partition = padded.reshape(out_features, chunks, partitions, 2).permute(2, 1, 3, 0)
    packed = weight.new_empty(prepacked_shape(out_features, in_features, blocks))
    for start in range(0, out_features, width):
        stop = min(start + width, out_features)
        block = by_partition[..., start:stop].reshape(partitions, -1)
        packed[:, start * chunks * 2 : stop * chunks * 2] = block
    return packed


@nki.jit
def packed_fp8_linear_kernel(
    packed: nl.NkiTensor,
    weight: nl.NkiTensor,
    weight_scale: nl.NkiTensor,
    bias: nl.NkiTensor = None,
    out_dtype=nl.bfloat16,
    dtype_mode: DtypeMode = DtypeMode.NON_OCP,
    static_scale: nl.NkiTensor = None,
) -> nl.NkiTensor:
    """Multiply packed rows by a prepacked FP8 weight.

    Runs without a grid or on a 1-D grid of programs, which share the output features.

    Args:
        packed: ``[T, H + 4]`` uint8 or FP8, in HBM, 1 <= T <= 32768; ``[T, H]`` with a static scale.
        weight: ``[P, J * 2 * N]`` uint8, what :func:`prepack` made of ``[N, H]``.
        weight_scale: ``[N]``, ``[1]`` or, of blocks of 128 x 128, ``[ceil(N / 128), ceil(H / 128)]`` fp32.
        bias: ``[N]`` bf16, fp16 or fp32.
        out_dtype: bfloat16, float16 or float32.
        dtype_mode: which FP8 codes and weight are: NON_OCP float8_e4m3 (Trainium2: ±240), OCP
            float8_e4m3fn (Trainium3).
        static_scale: STATIC: ``[128, 1]`` fp32, the one scale on every partition. None: a scale for each row.

    Returns:
        ``[T, N]`` of out_dtype in shared HBM.

    Raises:
        AssertionError: an argument is outside its limits; the message names limit and value.
    """
    ocp = dtype_mode == DtypeMode.OCP
    return _packed_fp8_linear(packed, weight, weight_scale, bias, static_scale, out_dtype, ocp)


@nki.jit
def packed_fp8_linear_bytes_kernel(
    packed: nl.NkiTensor,
    weight: nl.NkiTensor,
    weight_scale: nl.NkiTensor,
    bias: nl.NkiTensor = None,
    out_dtype: str = "bfloat16",
    ocp: bool = False,
    static_scale: nl.NkiTensor = None,
    digest: int = 0,
) -> nl.NkiTensor:
    """:func:`packed_fp8_linear_kernel` as a PyTorch graph calls it: tensors, numbers and strings.

    Args:
        packed: ``[T, H + 4]`` uint8; ``[T, H]`` with a static scale.
        weight: ``[P, J * 2 * N]`` uint8, prepacked.
        weight_scale: ``[N]``, ``[1]`` or ``[ceil(N / 128), ceil(H / 128)]`` fp32.
        bias: ``[N]`` bf16, fp16 or fp32, or None.
        out_dtype: a key of :data:`OUT_DTYPES`.
        ocp: codes and weight are float8_e4m3fn (Trainium3) instead of float8_e4m3.
        static_scale: ``[128, 1]`` fp32 is STATIC; None is a scale for each row.
        digest: :func:`.digest.digest`; not read, it makes a changed kernel another one for compile caches.

    Returns:
        ``[T, N]`` of out_dtype in shared HBM.

    Raises:
        AssertionError: as the kernel; an unknown out_dtype.
    """
    assert out_dtype in OUT_DTYPES, (
        f"out_dtype: expected 'bfloat16', 'float16' or 'float32', got '{out_dtype}'"
    )
    return _packed_fp8_linear(packed, weight, weight_scale, bias, static_scale, OUT_DTYPES[out_dtype], ocp)


def _packed_fp8_linear(packed, weight, weight_scale, bias, static_scale, out_dtype, ocp: bool):
    rows, features, in_features = _check(packed, weight, weight_scale, bias, static_scale)
    out = nl.ndarray((rows, features), dtype=out_dtype, buffer=nl.shared_hbm)
    plan = _Plan(rows, in_features, features, len(weight_scale.shape) == 2)
    if plan.first_block < plan.last_block:
        _multiply(plan, packed, weight, weight_scale, bias, static_scale, out, fp8_dtype(ocp))
    return out


def _check(packed, weight, weight_scale, bias, static_scale):
    """Assert the limits; return (T, N, H)."""
    tail = SCALE_BYTES if static_scale == None else 0
    assert len(packed.shape) == 2, f"packed: expected shape [T, H + {tail}], got {list(packed.shape)}"
    rows, in_features = packed.shape[0], packed.shape[1] - tail
    blocks = len(weight_scale.shape) == 2
    most = MAX_H_BLOCKS if blocks else MAX_H
    assert rows <= MAX_T, f"packed: expected T <= {MAX_T}, got {rows}"
    assert in_features >= 1 and in_features <= most, f"packed: expected 1 <= H <= {most}, got {in_features}"
    partitions, chunks, _ = layout(1, in_features, blocks)
    assert len(weight.shape) == 2 and weight.shape[0] == partitions and weight.shape[1] % (2 * chunks) == 0, (
        f"weight: expected the shape prepack() gives for H = {in_features}, "
        f"[{partitions}, {2 * chunks} * N], got {list(weight.shape)}"
    )
    assert weight.dtype == nl.uint8, f"weight: expected dtype uint8, got {weight.dtype}"
    features = weight.shape[1] // (2 * chunks)
    if blocks:
        expected = (_blocks(features), _blocks(in_features))
        assert tuple(weight_scale.shape) == expected, (
            f"weight_scale: expected shape {list(expected)}, got {list(weight_scale.shape)}"
        )
    else:
        assert tuple(weight_scale.shape) == (features,) or tuple(weight_scale.shape) == (1,), (
            f"weight_scale: expected shape [{features}] or [1], got {list(weight_scale.shape)}"
        )
    assert weight_scale.dtype == nl.float32, f"weight_scale: expected dtype float32, got {weight_scale.dtype}"
    if bias != None:
        assert tuple(bias.shape) == (features,), f"bias: expected shape [{features}], got {list(bias.shape)}"
    if static_scale != None:
        assert tuple(static_scale.shape) == (nl.tile_size.pmax, 1) and static_scale.dtype == nl.float32, (
            f"static_scale: expected shape [{nl.tile_size.pmax}, 1] of float32, got "
            f"{list(static_scale.shape)} of {static_scale.dtype}"
        )
    return rows, features, in_features


def _aligned(n: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _blocks(features: int) -> int:
    """Return the blocks of features that have a scale of their own."""
    return (features + SCALED - 1) // SCALED


class _Plan(nl.NKIObject):
    """How one call is cut, and how much of it SBUF holds at a time.

    Attributes:
        rows, in_features, features: T, H, N.
        partitions, chunks, width: P, J, W of :func:`layout`.
        columns: W rounded up, what a block of weight has in SBUF.
        first_block, last_block: this program's blocks of features, ``first_block <= block < last_block``.
        piece_chunks, pieces: a piece is piece_chunks of the J chunks (fewer in the last one).
        pitch: columns a tile of rows has in SBUF on its way, tile_rows or T rounded up.
        columns_of_rows: columns it has as an operand: the same, or 128 where blocks have scales.
        weight_buffers: blocks of weight in SBUF.
        resident: they are all of this program's: each is loaded once.
        scaled: blocks have scales. Of a chunk the first 64 partitions hold one block of 128 input features,
            the others the next. Both are multiplied at once, into results apart: a row is two columns of the
            stationary operand, one with the codes of one block and zeros, one with those of the other.
        groups: so many blocks are multiplied before their results are scaled, all at once: a row has so
            many columns, and results so many partitions. 1 without block scales.
        tile_rows: rows of a tile, 128 / groups.
        tiles, row_tiles: tiles of rows, in all and in a row block, which shares a pass over the weight.
        few_rows: TensorE transposes them. Before that they are in SBUF, each row cut into parts: lines of
            line_chunks chunks, each on a partition of its own.
        stages: pieces of rows on their way.
        stacked: results of so many blocks lie below one another on the partitions and leave in one transfer.
        row_buffers: tiles of rows in SBUF: two row blocks where there is room, else one.
    """

    def __init__(self, rows: int, in_features: int, features: int, scaled: bool):
        self.rows = rows
        self.in_features = in_features
        self.features = features
        self.scaled = scaled
        self.groups = 1
        if scaled:
            self.groups = 4 if rows <= nl.tile_size.pmax // 4 else 2
        pmax = nl.tile_size.pmax // self.groups
        self.tile_rows = pmax
        self.partitions, self.chunks, self.width = layout(features, in_features, scaled)
        self.columns = _aligned(self.width)
        blocks = (features + self.width - 1) // self.width
        self.first_block, self.last_block = share(blocks)
        self.tiles = (rows + pmax - 1) // pmax
        self.pitch = _aligned(min(rows, pmax))
        self.columns_of_rows = nl.tile_size.pmax if scaled else self.pitch
        most = FEW_ROWS_PIECES if rows <= FEW_ROWS else PIECES
        pieces = max(1, min(most, self.chunks * 2 * self.width // PIECE_BYTES))
        self.piece_chunks = (self.chunks + pieces - 1) // pieces
        self.pieces = (self.chunks + self.piece_chunks - 1) // self.piece_chunks

        # Bytes per partition. A block of weight comes with a scale and a bias for each of its features.
        block_bytes = (self.chunks * 2 + 8) * self.columns
        mine = self.last_block - self.first_block
        self.weight_buffers = min(mine, max(2, WEIGHT_BYTES // block_bytes))
        self.resident = self.weight_buffers == mine
        room = nl.tile_size.sbuf_fmax_bytes - SBUF_RESERVE - RESULTS * 4 * self.columns
        room -= self.weight_buffers * block_bytes
        if scaled:
            # Scales of blocks, once as they come and once by group; sums so far, and halves of them.
            of_blocks = (self.width // SCALED + 2) * (_blocks(in_features) + self.groups)
            room -= self.weight_buffers * 8 * of_blocks + (2 * RESULTS + 1) * 4 * self.columns
        piece_bytes = self.piece_chunks * 2 * self.pitch
        tile_bytes = self.pieces * self.piece_chunks * 2 * self.columns_of_rows

        # On their way rows take a stage a piece, few rows one for all.
        self.parts = 1
        if in_features == self.chunks * self.partitions * 2:
            while (
                min(rows, pmax) * self.parts * 2 <= nl.tile_size.pmax
                and self.chunks % (self.parts * 2) == 0
                and in_features >= self.parts * 2 * LINE_BYTES
            ):
                self.parts *= 2
        self.line_chunks = self.chunks // self.parts
        self.stages = min(2, self.tiles)
        staged = self.pieces * piece_bytes
        spent = self.stages * (self.line_chunks * self.partitions * 2 + staged)
        self.few_rows = (DEINTERLEAVE or scaled) and rows <= FEW_ROWS and spent + tile_bytes <= room
        if self.few_rows:
            room -= spent
        else:
            if in_features % 2 == 1:
                piece_bytes += self.piece_chunks * self.partitions * 2
            self.stages = min(STAGES[1], max(STAGES[0], STAGE_BYTES // piece_bytes))
            while self.stages > 1 and room - self.stages * piece_bytes < tile_bytes:
                self.stages -= 1
            room -= self.stages * piece_bytes
        self.stacked = nl.tile_size.pmax // rows if rows == 64 or rows == 32 else 1
        fitting = room // tile_bytes
        if self.tiles <= min(fitting, ROW_TILES):
            self.row_tiles, self.row_buffers = self.tiles, self.tiles
        else:
            most = max(1, min(ROW_TILES, fitting // 2))
            row_blocks = (self.tiles + most - 1) // most
            self.row_tiles = (self.tiles + row_blocks - 1) // row_blocks
            self.row_buffers = min(fitting, 2 * self.row_tiles)

    def rows_of(self, tile: int):
        """Return rows ``start, stop`` of a tile."""
        return tile * self.tile_rows, min((tile + 1) * self.tile_rows, self.rows)

    def features_of(self, block: int):
        """Return features ``start, stop`` of a block."""
        return block * self.width, min((block + 1) * self.width, self.features)

    def chunks_of(self, piece: int):
        """Return chunks ``start, stop`` of a piece."""
        return piece * self.piece_chunks, min((piece + 1) * self.piece_chunks, self.chunks)

    def pairs_in(self, chunk: int) -> int:
        """Return how many partitions of a chunk hold pairs: P but for the last chunk."""
        pairs = (self.in_features + 1) // 2
        return min(self.partitions, pairs - chunk * self.partitions)


class _Weights(nl.NKIObject):
    """Blocks of weight in SBUF, with the scales and the bias of their features on every partition.

    Args:
        plan: the call's.
        weight: ``[P, J * 2 * N]`` uint8 in HBM.
        weight_scale: ``[N]``, ``[1]`` or ``[ceil(N / 128), ceil(H / 128)]`` fp32 in HBM.
        bias: ``[N]`` in HBM, or None.
        fp8: what the codes are.
    """

    def __init__(self, plan: _Plan, weight, weight_scale, bias, fp8):
        self.plan = plan
        self.source = weight
        self.scale_source = weight_scale
        self.bias_source = bias
        self.fp8 = fp8
        self.pieces, self.scales, self.biases = [], [], []
        self.one_scale, self.scale_rows = None, []
        partitions = min(plan.rows, nl.tile_size.pmax)
        most = (plan.width - 1) // SCALED + 2 if plan.width % SCALED > 0 else plan.width // SCALED
        steps = (_blocks(plan.in_features) + plan.groups - 1) // plan.groups
        if plan.scaled:
            pass
        elif weight_scale.size == 1:
            self.one_scale = nl.ndarray((partitions, 1), dtype=nl.float32, buffer=nl.sbuf)
        for _ in range(plan.weight_buffers):
            pieces = []
            for piece in range(plan.pieces):
                start, stop = plan.chunks_of(piece)
                shape = (plan.partitions, (stop - start) * 2 * plan.columns)
                pieces.append(nl.ndarray(shape, dtype=nl.uint8, buffer=nl.sbuf))
            self.pieces.append(pieces)
            if plan.scaled:
                row, by_group = (1, most, steps * plan.groups), (nl.tile_size.pmax, most, steps)
                self.scale_rows.append(nl.ndarray(row, dtype=nl.float32, buffer=nl.sbuf))
                self.scales.append(nl.ndarray(by_group, dtype=nl.float32, buffer=nl.sbuf))
                if _blocks(plan.in_features) < steps * plan.groups:
                    nisa.memset(self.scale_rows[-1], 0, engine=nisa.engine.gpsimd)
            elif self.one_scale == None:
                self.scales.append(nl.ndarray((partitions, plan.width), dtype=nl.float32, buffer=nl.sbuf))
            if bias != None:
                self.biases.append(nl.ndarray((partitions, plan.width), dtype=bias.dtype, buffer=nl.sbuf))

    def load(self, block: int):
        """Load a block: its scales and bias, then its codes piece after piece."""
        self.load_scales(block)
        for piece in range(self.plan.pieces):
            self.load_piece(block, piece)

    def load_piece(self, block: int, piece: int):
        """Load some chunks of a block: one run of bytes on each partition, but for a last odd block.

        The very last chunks come one by one: what follows a transfer is then one matmul.
        """
        first, last = self.plan.features_of(block)
        start, stop = self.plan.chunks_of(piece)
        n, rows = last - first, (stop - start) * 2
        at = first * self.plan.chunks * 2 + start * 2 * n
        last_piece = block + 1 == self.plan.last_block and piece + 1 == self.plan.pieces
        step = 2 if self.plan.few_rows and last_piece else rows
        for row in range(0, rows, step):
            begin = at + row * n
            nisa.dma_copy(
                dst=self._rows(block, piece, rows, n)[:, row : row + step, :],
                src=self.source[:, begin : begin + step * n].reshape_dim(1, (step, n)),
            )

    def load_scales(self, block: int):
        """Copy the scales and the bias of a block's features to every partition."""
        first, last = self.plan.features_of(block)
        turn = block % self.plan.weight_buffers
        if self.plan.scaled:
            self._load_block_scales(block)
        elif self.one_scale == None:
            copy_to_partitions(self.scales[turn][:, 0 : last - first], self.scale_source, first)
        elif block == self.plan.first_block:
            copy_to_partitions(self.one_scale, self.scale_source, 0)
        if self.bias_source != None:
            copy_to_partitions(self.biases[turn][:, 0 : last - first], self.bias_source, first)

    def _load_block_scales(self, block: int):
        """Copy block scales, ``[blocks of N, blocks of H]``, to the partitions whose results they scale.

        They come to the first partition; VectorE copies every groups-th of a row to a group's partitions.
        """
        first, last = self.plan.features_of(block)
        begin, end = first // SCALED, _blocks(last)
        turn, groups = block % self.plan.weight_buffers, self.plan.groups
        row, scales = self.scale_rows[turn], self.scales[turn]
        width = self.scale_source.shape[1]
        source = self.scale_source.reshape((1, self.scale_source.shape[0], width))
        nisa.dma_copy(dst=row[:, 0 : end - begin, 0:width], src=source[:, begin:end, :])
        by_group = row.reshape_dim(2, (row.shape[2] // groups, groups))
        for start in range(0, nl.tile_size.pmax, 32):
            nisa.nc_stream_shuffle(
                dst=scales[start : start + 32, 0 : end - begin, :],
                src=by_group[:, 0 : end - begin, :, start // self.plan.tile_rows],
                shuffle_mask=[0] * 32,
            )

    def of_step(self, block: int, feature: int, step: int):
        """Return the scales of the results of a step, ``[128, 1]`` fp32, at an output feature of a block."""
        row = feature // SCALED - self.plan.features_of(block)[0] // SCALED
        return self.scales[block % self.plan.weight_buffers][:, row, step : step + 1]

    def moving(self, block: int, piece: int):
        """Return a piece as operands of matmuls, ``[P, chunks, 2, n]`` FP8."""
        first, last = self.plan.features_of(block)
        start, stop = self.plan.chunks_of(piece)
        rows = self._rows(block, piece, (stop - start) * 2, last - first)
        return rows.view(self.fp8).reshape_dim(1, (stop - start, 2))

    def _rows(self, block: int, piece: int, rows: int, n: int):
        """``[P, rows, n]``: the piece's place in SBUF, where a row has an aligned pitch."""
        tile = self.pieces[block % self.plan.weight_buffers][piece]
        pitch = _aligned(n)
        return tile[:, 0 : rows * pitch].reshape_dim(1, (rows, pitch))[:, :, 0:n]

    def scale(self, block: int, rows: int):
        """Return the scales of a block's features, ``[rows, n]`` fp32."""
        first, last = self.plan.features_of(block)
        return self.scales[block % self.plan.weight_buffers][0:rows, 0 : last - first]

    def bias(self, block: int, rows: int):
        """Return the bias of a block's features, ``[rows, n]``."""
        first, last = self.plan.features_of(block)
        return self.biases[block % self.plan.weight_buffers][0:rows, 0 : last - first]


class _Rows(nl.NKIObject):
    """Tiles of 128 rows in SBUF, transposed: pairs of input features along the partitions.

    Args:
        plan: the call's.
        packed: ``[T, H + 4]`` in HBM; ``[T, H]`` with a static scale.
        static_scale: ``[128, 1]`` fp32 in HBM, or None.
        fp8: what the codes are.
    """

    def __init__(self, plan: _Plan, packed, static_scale, fp8):
        pmax = nl.tile_size.pmax
        self.plan = plan
        self.source = packed
        self.static_source = static_scale
        self.fp8 = fp8
        self.pieces, self.scales, self.stages, self.loaded, self.banks = [], [], [], [], []
        self.turn = 0
        for _ in range(plan.row_buffers):
            pieces = []
            for piece in range(plan.pieces):
                start, stop = plan.chunks_of(piece)
                apart = (plan.partitions, stop - start, 2, plan.columns_of_rows)
                pieces.append(nl.ndarray(apart, dtype=nl.uint8, buffer=nl.sbuf))
                if plan.scaled:  # zeros in the columns of other groups, for good
                    nisa.memset(pieces[-1].view(nl.float32), 0, engine=nisa.engine.gpsimd)
            self.pieces.append(pieces)
            self.scales.append(nl.ndarray((pmax, 1), dtype=nl.float32, buffer=nl.sbuf))
        staged = plan.chunks if plan.few_rows else plan.piece_chunks
        loaded = plan.line_chunks if plan.few_rows else plan.piece_chunks
        for _ in range(plan.stages):
            stage = (plan.partitions, staged, plan.pitch)
            self.stages.append(nl.ndarray(stage, dtype=nl.bfloat16, buffer=nl.sbuf))
            if plan.few_rows or plan.in_features % 2 == 1:
                codes = (pmax, loaded * plan.partitions * 2)
                self.loaded.append(nl.ndarray(codes, dtype=nl.uint8, buffer=nl.sbuf))
        if plan.few_rows:
            for _ in range(TRANSPOSE_BANKS):
                bank = (pmax, nl.tile_size.psum_bank_fmax * 2)
                self.banks.append(nl.ndarray(bank, dtype=nl.bfloat16, buffer=nl.psum))

    def load(self, tile: int):
        """Load a tile: its scales, then its codes piece after piece."""
        self.load_scales(tile)
        self.fetch(tile)
        for piece in range(self.plan.pieces):
            self.load_piece(tile, piece)

    def load_scales(self, tile: int):
        """Load the last four bytes of each row, its scale; a byte copy needs no alignment.

        A static scale is loaded once for each buffer.
        """
        if self.static_source != None:
            if tile < self.plan.row_buffers:
                nisa.dma_copy(dst=self.scales[tile], src=self.static_source)
            return
        start, stop = self.plan.rows_of(tile)
        width = self.plan.in_features
        nisa.dma_copy(
            dst=self.scales[tile % self.plan.row_buffers].view(nl.uint8)[0 : stop - start, :],
            src=self.source.view(nl.uint8)[start:stop, width : width + SCALE_BYTES],
        )

    def fetch(self, tile: int):
        """Load few rows' codes, all in one transfer, and transpose them; of more rows pieces come one by one.

        TensorE takes a chunk of every line at a time: of ``rows * parts`` columns, part after part.
        """
        if not self.plan.few_rows:
            return
        start, stop = self.plan.rows_of(tile)
        rows, parts, width = stop - start, self.plan.parts, self.plan.in_features
        lines, partitions, chunks = rows * parts, self.plan.partitions, self.plan.line_chunks
        codes = self.loaded[tile % self.plan.stages][0:lines, :]
        nisa.dma_copy(
            dst=codes[:, 0 : width // parts],
            src=self.source.view(nl.uint8)[start:stop, 0:width].reshape_dim(1, (parts, width // parts)),
        )
        if width % 2 == 1:
            nisa.memset(codes[:, width : width + 1], 0, engine=nisa.engine.gpsimd)
        pairs = codes.view(nl.bfloat16)
        stage = self.stages[tile % self.plan.stages].reshape_dim(1, (parts, chunks))
        stage = stage[:, :, :, 0:rows].permute((0, 2, 3, 1))  # [P, chunks, rows, parts]
        pitch = _aligned(lines)
        together = nl.tile_size.psum_bank_fmax * 2 // pitch
        for first in range(0, chunks, together):
            last = min(first + together, chunks)
            bank = self.banks[first // together % TRANSPOSE_BANKS][:, 0 : together * pitch]
            bank = bank.reshape_dim(1, (together, pitch))[:, :, 0:lines]
            for chunk in range(first, last):
                used = self.plan.pairs_in(chunk)
                nisa.nc_transpose(
                    dst=bank[0:used, chunk - first, :],
                    data=pairs[:, chunk * partitions : chunk * partitions + used],
                    engine=nisa.engine.tensor,
                )
            for span in self._spans(first, last):
                start, stop, used = span
                nisa.tensor_copy(
                    dst=stage[0:used, start:stop, :, :],
                    src=bank[0:used, start - first : stop - first, :].reshape_dim(2, (rows, parts)),
                    engine=nisa.engine.vector,
                )

    def load_piece(self, tile: int, piece: int):
        """Load and transpose some chunks of a tile, as 2-byte pairs, then put the pairs' halves apart."""
        first_row, last_row = self.plan.rows_of(tile)
        rows = last_row - first_row
        first, last = self.plan.chunks_of(piece)
        if self.plan.few_rows:
            stage = self.stages[tile % self.plan.stages][:, first:last, :]
        elif DEINTERLEAVE or self.plan.scaled:
            stage = self.stages[self.turn % self.plan.stages]
        else:
            stage = self._interleaved(tile, piece)
        if not self.plan.few_rows:
            pairs = self._pairs(first_row, last_row, first, last)
        for span in self._spans(first, last):
            start, stop, used = span
            part = stage[0:used, start - first : stop - first, :]
            if not self.plan.few_rows:
                at = (start - first) * self.plan.partitions
                source = pairs[:, at : at + (stop - start) * used].reshape_dim(1, (stop - start, used))
                nisa.dma_transpose(dst=part[:, :, 0:rows], src=source, axes=(2, 1, 0))
            self._take_apart(tile, piece, part, start - first, rows)
        self.turn += 1

    def _spans(self, first: int, last: int):
        """Return chunks ``first <= chunk < last`` as (start, stop, partitions): the last can have fewer."""
        used, partitions = self.plan.pairs_in(last - 1), self.plan.partitions
        if used == partitions:
            return [(first, last, partitions)]
        if first + 1 == last:
            return [(first, last, used)]
        return [(first, last - 1, partitions), (last - 1, last, used)]

    def _pairs(self, start: int, stop: int, first: int, last: int):
        """Return pairs of codes, ``[rows, pairs]`` as bf16 (nothing computes with them), of some chunks.

        They are in HBM. An odd H leaves no 2-byte view of them there: copies lie in SBUF then, with a zero up
        to a whole pair.
        """
        at, end = first * self.plan.partitions * 2, last * self.plan.partitions * 2
        end = min(end, self.plan.in_features)
        source = self.source.view(nl.uint8)[start:stop, at:end]
        if self.plan.in_features % 2 == 0:
            return source.view(nl.bfloat16)
        whole = (end - at + 1) // 2 * 2
        loaded = self.loaded[self.turn % self.plan.stages][0 : stop - start, 0:whole]
        if end - at < whole:
            nisa.memset(loaded[:, end - at : whole], 0, engine=nisa.engine.gpsimd)
        nisa.dma_copy(dst=loaded[:, 0 : end - at], src=source)
        return loaded.view(nl.bfloat16)

    def _take_apart(self, tile: int, piece: int, stage, chunk: int, rows: int):
        """Copy pairs ``[p, chunks, pitch]`` to where even and odd input features lie apart, byte by byte.

        GpSimdE and ScalarE take turns: neither has anything else to do.
        """
        if self.plan.scaled:
            self._take_blocks_apart(tile, piece, stage, chunk, rows)
            return
        if not DEINTERLEAVE:
            return
        partitions, chunks = stage.shape[0], stage.shape[1]
        codes = self.pieces[tile % self.plan.row_buffers][piece]
        halves = stage.view(nl.uint8).reshape_dim(2, (self.plan.pitch, 2)).permute((0, 1, 3, 2))
        engine = nisa.engine.gpsimd if self.turn % 2 == 0 else nisa.engine.scalar
        nisa.tensor_copy(
            dst=codes[0:partitions, chunk : chunk + chunks, :, 0:rows],
            src=halves[:, :, :, 0:rows],
            engine=engine,
        )
        if rows < LEAST_ROWS:
            nisa.tensor_copy(
                dst=codes[0:partitions, chunk : chunk + chunks, :, rows:LEAST_ROWS],
                src=halves[:, :, :, 0:rows],
                engine=engine,
            )

    def _take_blocks_apart(self, tile: int, piece: int, stage, chunk: int, rows: int):
        """The same where blocks have scales: each half of the partitions to the columns of its group."""
        plan = self.plan
        partitions, chunks = stage.shape[0], stage.shape[1]
        codes = self.pieces[tile % plan.row_buffers][piece]
        halves = stage.view(nl.uint8).reshape_dim(2, (plan.pitch, 2)).permute((0, 1, 3, 2))
        together = plan.groups // 2  # chunks whose groups differ
        for half in range(2):
            first, last = half * 64, min(half * 64 + 64, partitions)
            for begin in range(min(together, chunks)):
                if first < last:
                    group = (plan.chunks_of(piece)[0] + chunk + begin) % together * 2 + half
                    column = group * plan.tile_rows
                    nisa.tensor_copy(
                        dst=codes[
                            first:last, chunk + begin : chunk + chunks : together, :, column : column + rows
                        ],
                        src=halves[first:last, begin:chunks:together, :, 0:rows],
                        engine=nisa.engine.gpsimd if (self.turn + half) % 2 == 0 else nisa.engine.scalar,
                    )

    def stationary(self, tile: int, piece: int, chunk: int):
        """Return an operand of matmuls, ``[used, 2, rows]`` FP8: a chunk, counted in the piece, of a tile."""
        start, stop = self.plan.rows_of(tile)
        used = self.plan.pairs_in(self.plan.chunks_of(piece)[0] + chunk)
        if DEINTERLEAVE or self.plan.scaled:
            rows = self.plan.columns_of_rows if self.plan.scaled else max(stop - start, LEAST_ROWS)
            codes = self.pieces[tile % self.plan.row_buffers][piece]
            return codes.view(self.fp8)[0:used, chunk, :, 0:rows]
        rows = stop - start
        pairs = self._interleaved(tile, piece).view(self.fp8)[0:used, chunk, 0 : rows * 2]
        return pairs.reshape_dim(1, (rows, 2)).permute((0, 2, 1))

    def _interleaved(self, tile: int, piece: int):
        """Return a piece's place in SBUF as pairs, ``[P, chunks, pitch]`` bf16."""
        codes = self.pieces[tile % self.plan.row_buffers][piece]
        return codes.flatten_dims(2, 3).view(nl.bfloat16)

    def scale(self, tile: int):
        """Return the scales of a tile's rows, ``[rows, 1]`` fp32."""
        start, stop = self.plan.rows_of(tile)
        return self.scales[tile % self.plan.row_buffers][0 : stop - start, :]


def _multiply(plan: _Plan, packed, weight, weight_scale, bias, static_scale, out, fp8):
    """Compute this program's blocks of features of ``out [T, N]``."""
    rows = _Rows(plan, packed, static_scale, fp8)
    weights = _Weights(plan, weight, weight_scale, bias, fp8)
    banks = []
    for _ in range(nl.tile_size.psum_num_banks - len(rows.banks)):
        bank = (nl.tile_size.pmax, nl.tile_size.psum_bank_fmax)
        banks.append(nl.ndarray(bank, dtype=nl.float32, buffer=nl.psum))

    # The first tile and the first block arrive together; their scales, which nothing waits for, last. Those
    # of blocks are waited for.
    for piece in range(plan.pieces):
        weights.load_piece(plan.first_block, piece)
        if piece == 0:
            rows.fetch(0)
        if piece + 1 == (1 if plan.scaled else plan.pieces):
            rows.load_scales(0)
            weights.load_scales(plan.first_block)
        rows.load_piece(0, piece)
    outputs = _Outputs(plan, out, rows, weights)
    sums = _Sums(plan, banks)
    turn = 0
    waiting = []
    for first in range(0, plan.tiles, plan.row_tiles):
        last = min(first + plan.row_tiles, plan.tiles)
        for tile in range(max(first, 1), last):
            rows.load(tile)
        for block in range(plan.first_block, plan.last_block):
            loaded = block == plan.first_block if first == 0 else plan.resident
            if not loaded:
                weights.load(block)
            for tile in range(first, last):
                if plan.scaled:
                    # Folded one turn late, when VectorE need not wait for what the others add to it.
                    waiting.append((sums.contract(rows, weights, tile, block), tile, block))
                    if len(waiting) > 1:
                        ready = waiting.pop(0)
                        outputs.put(sums.fold(ready[0]), ready[1], ready[2])
                else:
                    bank = banks[turn % len(banks)]
                    _contract(plan, bank, rows, weights, tile, block)
                    outputs.put(bank, tile, block)
                turn += 1
        for ready in waiting:
            outputs.put(sums.fold(ready[0]), ready[1], ready[2])
        waiting = []


def _contract(plan: _Plan, bank, rows: _Rows, weights: _Weights, tile: int, block: int):
    """``bank = Σ_j codes[:, j]ᵀ weight[:, j]``, two rows of the contraction on each partition."""
    for piece in range(plan.pieces):
        start, stop = plan.chunks_of(piece)
        moving = weights.moving(block, piece)
        for chunk in range(stop - start):
            stationary = rows.stationary(tile, piece, chunk)
            nisa.nc_matmul(
                dst=bank[0 : stationary.shape[2], 0 : moving.shape[3]],
                stationary=stationary,
                moving=moving[0 : stationary.shape[0], chunk, :, :],
                accumulate=start + chunk > 0,
                perf_mode=nisa.matmul_perf_mode.double_row,
            )


class _Sums(nl.NKIObject):
    """Sums where blocks have scales: of 128 input features each in PSUM, scaled and added up in SBUF.

    A step is as many chunks as fill the groups. Its results are ``[128, n]``, group after group of rows on
    the partitions, and so are their sums, which come together at the end. An addition waits for the one
    before into the same sum: where blocks are narrow there are two sums, in turns.

    Args:
        plan: the call's.
        banks: of PSUM.
    """

    def __init__(self, plan: _Plan, banks):
        self.plan = plan
        self.banks = banks
        self.sums, self.halves = [], []
        self.turn, self.results = 0, 0
        self.chains = 1 if plan.width > 2 * SCALED else 2
        if plan.scaled:
            shape = (nl.tile_size.pmax, plan.width)
            for _ in range(RESULTS):
                sums = []
                for _ in range(self.chains):
                    sums.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf))
                self.sums.append(sums)
            self.halves.append(nl.ndarray((shape[0] // 2, plan.width), dtype=nl.float32, buffer=nl.sbuf))

    def contract(self, rows: _Rows, weights: _Weights, tile: int, block: int):
        """Return scaled sums of a tile's rows, ``[128, n]`` fp32 in SBUF each, for :meth:`fold` to add up."""
        plan = self.plan
        first, last = plan.features_of(block)
        sums = []
        for one in self.sums[self.results % RESULTS]:
            sums.append(one[:, 0 : last - first])
        self.results += 1
        together = plan.groups // 2
        for piece in range(plan.pieces):
            start, stop = plan.chunks_of(piece)
            moving = weights.moving(block, piece)
            for chunk in range(start, stop):
                bank = self.banks[self.turn % len(self.banks)][:, 0 : last - first]
                stationary = rows.stationary(tile, piece, chunk - start)
                nisa.nc_matmul(
                    dst=bank,
                    stationary=stationary,
                    moving=moving[0 : stationary.shape[0], chunk - start, :, :],
                    accumulate=chunk % together > 0,
                    perf_mode=nisa.matmul_perf_mode.double_row,
                )
                if chunk % together == together - 1 or chunk == plan.chunks - 1:
                    self._add(sums, bank, weights, block, chunk // together)
                    self.turn += 1
        if plan.chunks <= together:  # a single step
            return sums[0:1]
        return sums

    def _add(self, sums, bank, weights: _Weights, block: int, step: int):
        """``sum += bank * scale``, features that share a scale at a time; a sum's first step writes."""
        first, last = self.plan.features_of(block)
        total = sums[step % self.chains]
        for scaled in range(first // SCALED, _blocks(last)):
            feature = max(first, scaled * SCALED)
            start, stop = feature - first, min(last, scaled * SCALED + SCALED) - first
            part, results = total[:, start:stop], bank[:, start:stop]
            scale = weights.of_step(block, feature, step)
            if step < self.chains:
                nisa.tensor_scalar(dst=part, data=results, op0=nl.multiply, operand0=scale)
            else:
                nisa.scalar_tensor_tensor(
                    dst=part, data=results, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=part
                )

    def fold(self, sums):
        """Return the sum of sums and groups, ``[rows, n]`` (on more partitions)."""
        total = sums[0]
        for other in sums[1:]:
            nisa.tensor_tensor(dst=total, data1=total, data2=other, op=nl.add, engine=nisa.engine.gpsimd)
        half = nl.tile_size.pmax // 2
        upper = self.halves[0][:, 0 : total.shape[1]]
        while half >= self.plan.tile_rows:
            nisa.tensor_copy(dst=upper[0:half, :], src=total[half : 2 * half, :], engine=nisa.engine.scalar)
            nisa.tensor_tensor(
                dst=total[0:half, :], data1=total[0:half, :], data2=upper[0:half, :], op=nl.add
            )
            half = half // 2
        return total


class _Outputs(nl.NKIObject):
    """Results on their way out: scaled and rounded from PSUM to SBUF, and stored.

    Args:
        plan: the call's.
        out: ``[T, N]`` in HBM.
        rows, weights: whose scales and bias apply.
    """

    def __init__(self, plan: _Plan, out, rows: _Rows, weights: _Weights):
        self.plan = plan
        self.out = out
        self.rows = rows
        self.weights = weights
        self.tiles = []
        for _ in range(RESULTS):
            self.tiles.append(nl.ndarray((nl.tile_size.pmax, plan.width), dtype=out.dtype, buffer=nl.sbuf))
        self.turn = 0
        self.blocks = 0  # that lie in the tile whose turn it is

    def put(self, bank, tile: int, block: int):
        """Scale a tile's product with a block; store it, or with the next blocks' where these fill a tile.

        The product is in PSUM, or in SBUF with the scales of the weight's blocks in it already.
        """
        start, stop = self.plan.rows_of(tile)
        first, last = self.plan.features_of(block)
        count, n = stop - start, last - first
        at = self.blocks * count
        self._scale(self.tiles[self.turn % RESULTS][at : at + count, 0:n], bank[0:count, 0:n], tile, block)
        self.blocks += 1
        following = self.plan.features_of(block + 1)
        alone = block + 1 == self.plan.last_block or following[1] - following[0] != n
        if self.blocks == self.plan.stacked or alone:
            begin = last - self.blocks * n
            out = self.out[start:stop, begin:last].reshape_dim(1, (self.blocks, n)).permute((1, 0, 2))
            nisa.dma_copy(dst=out, src=self.tiles[self.turn % RESULTS][0 : self.blocks * count, 0:n])
            self.turn += 1
            self.blocks = 0

    def _scale(self, rounded, psum, tile: int, block: int):
        """``rounded = psum * row scale * weight scale [+ bias]``."""
        count = psum.shape[0]
        scaled = rounded if self.weights.bias_source == None else psum  # fp32, in place
        if self.plan.scaled:
            nisa.tensor_scalar(dst=scaled, data=psum, op0=nl.multiply, operand0=self.rows.scale(tile))
        elif self.weights.one_scale == None:
            nisa.scalar_tensor_tensor(
                dst=scaled,
                data=psum,
                op0=nl.multiply,
                operand0=self.rows.scale(tile),
                op1=nl.multiply,
                operand1=self.weights.scale(block, count),
            )
        else:
            nisa.tensor_scalar(
                dst=scaled,
                data=psum,
                op0=nl.multiply,
                operand0=self.rows.scale(tile),
                op1=nl.multiply,
                operand1=self.weights.one_scale[0:count, :],
            )
        if self.weights.bias_source != None:
            nisa.tensor_tensor(dst=rounded, data1=psum, data2=self.weights.bias(block, count), op=nl.add)
