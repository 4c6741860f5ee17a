"""Packed FP8 rows times an FP8 weight: codes and row scales are read where the norm left them.

Dimensions:
    T: rows (tokens), 1 .. 32768
    H: input features, the contraction, 1 .. 65536
    N: output features
    P, J: pairs of neighbouring input features lie in J chunks of P <= 128, one pair to a partition
    W: output features computed together, a block; a multiple of 32 (N where there is but one), at most 512

The result is ``out[t, n] = (Σ_h code[t, h] * weight[n, h]) * scale[t] * weight_scale[n] + bias[n]``, the sum
in fp32. docs/kernels/packed_fp8_linear.md says how, why so, and what the hardware has yet to confirm.
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
SBUF_RESERVE = 2048  # bytes per partition for the tiles of one number per row


def layout(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Return how a weight is laid out, a function of its shape alone.

    Args:
        out_features: N.
        in_features: H.

    Returns:
        ``(P, J, W)``: pairs of codes in a chunk, chunks, features in a block (fewer in the last one).
    """
    pairs = (in_features + 1) // 2
    chunks = (pairs + 127) // 128
    widest = min(BLOCK_FEATURES, BLOCK_BYTES // (2 * chunks) // ALIGNMENT * ALIGNMENT)
    width = min(widest, out_features)
    if out_features >= BLOCK_FEATURES // 2:
        # The width that leaves the one of two programs that has more features the least; of these the widest.
        least = out_features
        for narrower in range(0, max(0, widest - NARROW_BLOCK) + 1, ALIGNMENT):
            candidate = widest - narrower
            blocks = (out_features + candidate - 1) // candidate
            larger_half = (blocks + 1) // 2 * candidate
            if larger_half < least:
                width, least = candidate, larger_half
    return (pairs + chunks - 1) // chunks, chunks, width


def prepacked_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Return the shape of what :func:`prepack` returns for a weight ``[out_features, in_features]``."""
    partitions, chunks, _ = layout(out_features, in_features)
    return partitions, chunks * 2 * out_features


def prepack(weight):
    """Lay a weight out for :func:`packed_fp8_linear_kernel`; call it once, at load.

    Args:
        weight: ``[N, H]`` torch.uint8, the FP8 codes; any device.

    Returns:
        ``[P, J * 2 * N]`` torch.uint8: block after block of W features, ``[J, 2, W]`` bytes on each
        partition. In a block that starts at feature n0, and has n of them,
        ``weight[n0 + k, 2 * (j * P + p) + i]`` is byte ``(j * 2 + i) * n + k`` of partition p.
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
def packed_fp8_linear_kernel(
    packed: nl.NkiTensor,
    weight: nl.NkiTensor,
    weight_scale: nl.NkiTensor,
    bias: nl.NkiTensor = None,
    out_dtype=nl.bfloat16,
    dtype_mode: DtypeMode = DtypeMode.NON_OCP,
) -> nl.NkiTensor:
    """Multiply packed rows by a prepacked FP8 weight.

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
    return _packed_fp8_linear(packed, weight, weight_scale, bias, out_dtype, dtype_mode == DtypeMode.OCP)


@nki.jit
def packed_fp8_linear_bytes_kernel(
    packed: nl.NkiTensor,
    weight: nl.NkiTensor,
    weight_scale: nl.NkiTensor,
    bias: nl.NkiTensor = None,
    out_dtype: str = "bfloat16",
    ocp: bool = False,
    digest: int = 0,
) -> nl.NkiTensor:
    """:func:`packed_fp8_linear_kernel` as a PyTorch graph calls it: tensors, numbers and strings.

    Args:
        packed: ``[T, H + 4]`` uint8.
        weight: ``[P, J * 2 * N]`` uint8, prepacked.
        weight_scale: ``[N]`` or ``[1]`` fp32.
        bias: ``[N]`` bf16, fp16 or fp32, or None.
        out_dtype: a key of :data:`OUT_DTYPES`.
        ocp: codes and weight are float8_e4m3fn (Trainium3) instead of float8_e4m3.
        digest: :func:`.digest.digest`; not read, it makes a changed kernel another one for compile caches.

    Returns:
        ``[T, N]`` of out_dtype in shared HBM.

    Raises:
        AssertionError: as the kernel; an unknown out_dtype.
    """
    assert out_dtype in OUT_DTYPES, (
        f"out_dtype: expected 'bfloat16', 'float16' or 'float32', got '{out_dtype}'"
    )
    return _packed_fp8_linear(packed, weight, weight_scale, bias, OUT_DTYPES[out_dtype], ocp)


def _packed_fp8_linear(packed, weight, weight_scale, bias, out_dtype, ocp: bool):
    rows, features, in_features = _check(packed, weight, weight_scale, bias)
    out = nl.ndarray((rows, features), dtype=out_dtype, buffer=nl.shared_hbm)
    plan = _Plan(rows, in_features, features)
    if plan.first_block < plan.last_block:
        _multiply(plan, packed, weight, weight_scale, bias, out, fp8_dtype(ocp))
    return out


def _check(packed, weight, weight_scale, bias):
    """Assert the limits; return (T, N, H)."""
    assert len(packed.shape) == 2, f"packed: expected shape [T, H + {SCALE_BYTES}], got {list(packed.shape)}"
    rows, in_features = packed.shape[0], packed.shape[1] - SCALE_BYTES
    assert rows <= MAX_T, f"packed: expected T <= {MAX_T}, got {rows}"
    assert in_features >= 1 and in_features <= MAX_H, f"packed: expected 1 <= H <= {MAX_H}, got {in_features}"
    partitions, chunks, _ = layout(1, in_features)
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
    return rows, features, in_features


def _aligned(n: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class _Plan(nl.NKIObject):
    """How one call is cut, and how much of it SBUF holds at a time.

    Attributes:
        rows, in_features, features: T, H, N.
        partitions, chunks, width: P, J, W of :func:`layout`.
        columns: W rounded up, what a block of weight has in SBUF.
        first_block, last_block: this program's blocks of features, ``first_block <= block < last_block``.
        piece_chunks, pieces: a piece is piece_chunks of the J chunks (fewer in the last one).
        pitch: columns a tile of rows has in SBUF, 128 or T rounded up.
        weight_buffers: blocks of weight in SBUF.
        resident: they are all of this program's: each is loaded once.
        tiles, row_tiles: tiles of 128 rows, in all and in a row block, which shares a pass over the weight.
        few_rows: TensorE transposes them. Before that they are in SBUF, each row cut into parts: lines of
            line_chunks chunks, each on a partition of its own.
        stages: pieces of rows on their way.
        stacked: results of so many blocks lie below one another on the partitions and leave in one transfer.
        row_buffers: tiles of rows in SBUF: two row blocks where there is room, else one.
    """

    def __init__(self, rows: int, in_features: int, features: int):
        pmax = nl.tile_size.pmax
        self.rows = rows
        self.in_features = in_features
        self.features = features
        self.partitions, self.chunks, self.width = layout(features, in_features)
        self.columns = _aligned(self.width)
        blocks = (features + self.width - 1) // self.width
        self.first_block, self.last_block = share(blocks)
        self.tiles = (rows + pmax - 1) // pmax
        self.pitch = _aligned(min(rows, pmax))
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
        piece_bytes = self.piece_chunks * 2 * self.pitch
        tile_bytes = self.pieces * piece_bytes

        # On their way rows take a stage a piece, few rows one for all.
        self.parts = 1
        if in_features == self.chunks * self.partitions * 2:
            while (
                min(rows, pmax) * self.parts * 2 <= pmax
                and self.chunks % (self.parts * 2) == 0
                and in_features >= self.parts * 2 * LINE_BYTES
            ):
                self.parts *= 2
        self.line_chunks = self.chunks // self.parts
        self.stages = min(2, self.tiles)
        spent = self.stages * (self.line_chunks * self.partitions * 2 + tile_bytes)
        self.few_rows = DEINTERLEAVE and rows <= FEW_ROWS and spent + tile_bytes <= room
        if self.few_rows:
            room -= spent
        else:
            if in_features % 2 == 1:
                piece_bytes += self.piece_chunks * self.partitions * 2
            self.stages = min(STAGES[1], max(STAGES[0], STAGE_BYTES // piece_bytes))
            while self.stages > 1 and room - self.stages * piece_bytes < tile_bytes:
                self.stages -= 1
            room -= self.stages * piece_bytes
        self.stacked = pmax // rows if rows == pmax // 2 or rows == pmax // 4 else 1
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
        pmax = nl.tile_size.pmax
        return tile * pmax, min((tile + 1) * pmax, self.rows)

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
        weight_scale: ``[N]`` or ``[1]`` fp32 in HBM.
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
        self.one_scale = None
        partitions = min(plan.rows, nl.tile_size.pmax)
        if weight_scale.size == 1:
            self.one_scale = nl.ndarray((partitions, 1), dtype=nl.float32, buffer=nl.sbuf)
        for _ in range(plan.weight_buffers):
            pieces = []
            for piece in range(plan.pieces):
                start, stop = plan.chunks_of(piece)
                shape = (plan.partitions, (stop - start) * 2 * plan.columns)
                pieces.append(nl.ndarray(shape, dtype=nl.uint8, buffer=nl.sbuf))
            self.pieces.append(pieces)
            if self.one_scale == None:
                self.scales.append(nl.ndarray((partitions, plan.width), dtype=nl.float32, buffer=nl.sbuf))
            if bias != None:
                self.biases.append(nl.ndarray((partitions, plan.width), dtype=bias.dtype, buffer=nl.sbuf))

    def load(self, block: int):
        """Load a block: its scales and bias, then its codes piece after piece."""
        self.load_scales(block)
        for piece in range(self.plan.pieces):
            self.load_piece(block, piece)

    def load_piece(self, block: int, piece: int):
        """Load some chunks of a block: one run of bytes on each partition, but for a last odd block."""
        first, last = self.plan.features_of(block)
        start, stop = self.plan.chunks_of(piece)
        n, rows = last - first, (stop - start) * 2
        at = first * self.plan.chunks * 2 + start * 2 * n
        nisa.dma_copy(
            dst=self._rows(block, piece, rows, n),
            src=self.source[:, at : at + rows * n].reshape_dim(1, (rows, n)),
        )

    def load_scales(self, block: int):
        """Copy the scales and the bias of a block's features to every partition."""
        first, last = self.plan.features_of(block)
        turn = block % self.plan.weight_buffers
        if self.one_scale == None:
            copy_to_partitions(self.scales[turn][:, 0 : last - first], self.scale_source, first)
        elif block == self.plan.first_block:
            copy_to_partitions(self.one_scale, self.scale_source, 0)
        if self.bias_source != None:
            copy_to_partitions(self.biases[turn][:, 0 : last - first], self.bias_source, first)

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
        packed: ``[T, H + 4]`` in HBM.
        fp8: what the codes are.
    """

    def __init__(self, plan: _Plan, packed, fp8):
        pmax = nl.tile_size.pmax
        self.plan = plan
        self.source = packed
        self.fp8 = fp8
        self.pieces, self.scales, self.stages, self.loaded, self.banks = [], [], [], [], []
        self.turn = 0
        for _ in range(plan.row_buffers):
            pieces = []
            for piece in range(plan.pieces):
                start, stop = plan.chunks_of(piece)
                apart = (plan.partitions, stop - start, 2, plan.pitch)
                pieces.append(nl.ndarray(apart, dtype=nl.uint8, buffer=nl.sbuf))
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
        """Load the last four bytes of each row, its scale; a byte copy needs no alignment."""
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
        elif DEINTERLEAVE:
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

    def stationary(self, tile: int, piece: int, chunk: int):
        """Return an operand of matmuls, ``[used, 2, rows]`` FP8: a chunk, counted in the piece, of a tile."""
        start, stop = self.plan.rows_of(tile)
        used = self.plan.pairs_in(self.plan.chunks_of(piece)[0] + chunk)
        if DEINTERLEAVE:
            rows = max(stop - start, LEAST_ROWS)
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


def _multiply(plan: _Plan, packed, weight, weight_scale, bias, out, fp8):
    """Compute this program's blocks of features of ``out [T, N]``."""
    rows = _Rows(plan, packed, fp8)
    weights = _Weights(plan, weight, weight_scale, bias, fp8)
    banks = []
    for _ in range(nl.tile_size.psum_num_banks - len(rows.banks)):
        bank = (nl.tile_size.pmax, nl.tile_size.psum_bank_fmax)
        banks.append(nl.ndarray(bank, dtype=nl.float32, buffer=nl.psum))

    # The first tile and the first block arrive together.
    for piece in range(plan.pieces):
        weights.load_piece(plan.first_block, piece)
        if piece == 0:
            rows.fetch(0)
        if piece == plan.pieces // 2:
            rows.load_scales(0)
            weights.load_scales(plan.first_block)
        rows.load_piece(0, piece)
    outputs = _Outputs(plan, out, rows, weights)
    turn = 0
    for first in range(0, plan.tiles, plan.row_tiles):
        last = min(first + plan.row_tiles, plan.tiles)
        for tile in range(max(first, 1), last):
            rows.load(tile)
        for block in range(plan.first_block, plan.last_block):
            loaded = block == plan.first_block if first == 0 else plan.resident
            if not loaded:
                weights.load(block)
            for tile in range(first, last):
                bank = banks[turn % len(banks)]
                _contract(plan, bank, rows, weights, tile, block)
                outputs.put(bank, tile, block)
                turn += 1


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
        """Scale a tile's product with a block; store it, or with the next blocks' where these fill a tile."""
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
        if self.weights.one_scale == None:
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
